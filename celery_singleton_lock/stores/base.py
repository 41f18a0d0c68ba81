"""What a store can do.

A store gets a lock key, an owner token and a ttl, and answers with plain data. It knows no
policy, no task and no thread. Every verb is idempotent per owner token, so that a call whose
reply was lost can be made again.
"""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import Holder


class Claimant(NamedTuple):
    """What a run says of itself when it asks for a lock; shown to whoever meets the lock.

    Attributes:
        task_id: The task id of the run; empty for code that is no task.
        worker: The Celery node name, or the host name outside a worker.
        pid: The process that runs the body.
        call: Digest of which call it is, with all its arguments; empty where nobody asks.
    """

    task_id: str
    worker: str
    pid: int
    call: str = ""


class Claim(NamedTuple):
    """What it takes to renew a lock.

    Attributes:
        key: The lock key.
        owner_token: The secret of the execution that holds the lock.
        ttl: Seconds that the lock shall live from now on.
    """

    key: str
    owner_token: str
    ttl: float


class Place(NamedTuple):
    """Where a run stands in a lock's line, first come first served.

    Attributes:
        number: Its place; earlier ones come first. 0: a new one, at the end. :data:`UNTOLD`: the
            one that this owner has already, if it has one, else a new one.
        served: The line's count of those who were let in, as of when it first stood there.
        due_in: Seconds until it asks again by itself, from its queue; ``None``: it is awake, and
            waits to be handed the lock.
    """

    number: int = 0
    served: int = 0
    due_in: float | None = None


class Generation(NamedTuple):
    """How new an update is, among those of one task.

    Attributes:
        task_name: The task.
        number: When it was published, in µs since the epoch; 0, or later than now by the store's
            clock: by arrival.
    """

    task_name: str
    number: int = 0


class Reserved(NamedTuple):
    """What was taken for a run when it was published, beside its lock.

    Attributes:
        key: Where.
        seconds: How long it is to be kept from each time on that its run goes back to the queue.
    """

    key: str
    seconds: float


class Reservation(NamedTuple):
    """The answer to ``reserve``.

    Attributes:
        is_reserved: Whether it is the asking task id's now.
        holder: Whose it is, whoever that is.
        is_running: Whether that one has the lock by now, so that its body runs, or has just ended.
        is_same_call: Whether holder and asker are the same call, as far as both tell theirs.
    """

    is_reserved: bool
    holder: Holder
    is_running: bool = False
    is_same_call: bool = False


class Acquisition(NamedTuple):
    """The answer to ``acquire``.

    Attributes:
        is_acquired: Whether the asking owner has the lock now.
        holder: Who has it, whoever that is; of a free lock that is kept for somebody in line, who
            that is (with no fencing token yet).
        epoch: If it was acquired: which life of the store's data the lock belongs to. Another
            one now means that the store has lost data since; see :meth:`LockStore.restore`.
        place: If it was not: where the asker stands in line now, if it asked for a place.
        seen: If it stands there: how many were let in since, while somebody was in its queue.
        look_in: If it was not: seconds after which it may be free although nobody is woken.
        is_holder_queued: Whether the holder is in its queue: the lock is kept for its retry, or was
            reserved for it.
        is_same_call: Whether holder and asker are the same call, as far as both tell theirs.
        generation: The number of the asker's generation, if it told one.
        is_newest: If it was refused: whether none that is newer was. Then the lock will be kept
            for it, or for a newer one, once it is released.
        is_superseded: Whether it was refused because a newer one has had the lock, which is the
            holder then.
    """

    is_acquired: bool
    holder: Holder
    epoch: str = ""
    place: Place | None = None
    seen: int = 0
    look_in: float = 0.0
    is_holder_queued: bool = False
    is_same_call: bool = False
    generation: int = 0
    is_newest: bool = False
    is_superseded: bool = False


#: Number of a place that was asked for, while it is not known whether the store gave it.
UNTOLD = -1
#: Seconds that the place of one who is awake lives after its last question.
PLACE_LIVES = 2.0
#: Seconds that the place of one who is in its queue lives after it was due.
DUE_FOR = 2.0
#: Seconds that a lock which was handed to a place waits for its owner to take it.
HANDED_OVER_FOR = 2.0
#: Seconds that a lock is kept for the newest of those that were refused under "rerun".
FOLLOW_UP_FOR = 10.0
#: So often somebody may be let in before one who is in its queue; then the lock waits for it.
MOST_PASSES = 3


class LockStore(ABC):
    """Where locks live, and who stands in line for them.

    A lock that becomes free is handed to the first in its line who is awake: for
    :data:`HANDED_OVER_FOR` seconds, and with that one's next ``acquire`` for the ttl.

    Those who are in their queue cannot be handed anything, and are passed meanwhile; but when the
    first of them has seen :data:`MOST_PASSES` others let in, the lock stays free for such as have,
    until one of them comes or the first one's place lapses. One who is new also gives way to the
    first of them if that one is due, hence on its way.

    Errors: every method raises :class:`~celery_singleton_lock.errors.StoreError` when the store
    did not answer; what was asked may or may not have happened then.
    """

    #: Whether two processes that use this store meet each other's locks.
    is_shared_between_processes: bool

    @abstractmethod
    def acquire(
        self,
        key: str,
        owner_token: str,
        ttl: float,
        claimant: Claimant,
        place: Place | None = None,
        reserved: Reserved | None = None,
        generation: Generation | None = None,
    ) -> Acquisition:
        """Take the lock if it is free and nobody before us in line wants it, for ``ttl`` seconds.

        An owner that has it already gets the same fencing token again, and the full ttl. A lock
        that is kept after its release is free for the task id that it is kept for.

        Args:
            key: The lock key.
            owner_token: The secret of the asking execution.
            ttl: Seconds that the lock shall live.
            claimant: What others are told about the asker.
            place: Stand there in line if the lock is refused; ``None``: do not stand in line.
                Nobody stands in line for a lock that is held under its own task id.
            reserved: Give this back with taking the lock, and else keep it, as far as it is the
                asker's.
            generation: Refuse the lock once a newer generation of the same task has had it, and
                keep it after its release for the newest that met it, who has to come again. Such
                a one does not stand in line.
        """

    @abstractmethod
    def await_turn(self, key: str, place: Place, seconds: float) -> None:
        """Sleep until the lock is handed to this place, at most so long.

        Only a hint: whether the lock is ours, ``acquire`` tells.
        """

    @abstractmethod
    def renew_many(self, claims: Sequence[Claim]) -> list[bool]:
        """Set the remaining life of each lock back to its ttl where the claimant still owns it.

        Returns:
            One answer per claim, in order: False when the lock has expired or another run holds
            it. A lock is never re-created: a lost lease stays lost.
        """

    def renew(self, key: str, owner_token: str, ttl: float) -> bool:
        """:meth:`renew_many` for one claim."""
        return self.renew_many([Claim(key, owner_token, ttl)])[0]

    @abstractmethod
    def release(
        self,
        key: str,
        owner_token: str,
        at_least_for: float = 0.0,
        place: Place | None = None,
    ) -> bool:
        """Give the lock back if the caller still owns it, and leave ``place``.

        It goes to the next in line then, or is free, unless it has been held for less than
        ``at_least_for`` seconds since the first attempt took it, or is promised to a retry
        (:meth:`hold`): then it is kept that long, for nobody but another run of the same task id.

        Returns:
            False when it was not the caller's any more; then the lock was not changed.
        """

    @abstractmethod
    def hold(self, key: str, owner_token: str, seconds: float) -> bool:
        """Promise the lock to the next attempt: keep it so long after its release.

        0.0 takes the promise back, and so does the next attempt when it takes the lock.

        Returns:
            False when it was not the caller's any more; then nothing was changed.
        """

    @abstractmethod
    def reserve(self, key: str, claimant: Claimant, seconds: float) -> Reservation:
        """Keep a free lock so long for a run that is to be published, as for a retry.

        Only a run of that task id can take it; one that asks again gets the full time again. Who
        stands in line and could have the lock goes before.
        """

    @abstractmethod
    def cancel(self, key: str, task_id: str, at_least_for: float = 0.0) -> bool:
        """Give back what is kept for a run that will not come, or is to be kept for it.

        A lock that was held before goes on being kept for ``at_least_for``; see :meth:`release`.

        Returns:
            False when it is neither kept for that task id nor to be, or is held by it; then nothing
            was changed.
        """

    @abstractmethod
    def restore(
        self, key: str, owner_token: str, ttl: float, holder: Holder, epoch: str
    ) -> str | None:
        """Put a lock back that the store has lost, for ``ttl`` seconds, as it was.

        Only if the store itself shows that it has lost data since the lock was taken, and the
        key is free: a lock that expired, or that was freed by whomever, stays so. The caller has
        to know that its run still goes on, and that nobody else could have had the lock.

        Args:
            key: The lock key.
            owner_token: The secret of the execution that had the lock.
            ttl: Seconds that it shall live from now on.
            holder: As ``acquire`` gave it; the fencing token stays, and later ones are higher.
            epoch: As ``acquire``, or the last ``restore``, gave it.

        Returns:
            The store's epoch now; ``None`` when the lock was not put back.
        """

    @abstractmethod
    def holder(self, key: str) -> Holder | None:
        """Who has the lock, or ``None`` when it is free."""

    def check(self, key: str) -> None:
        """Take, renew, hand over and give back a lock on ``key``, which nobody else may know.

        Raises:
            StoreError: The store cannot keep locks for us.
        """
        first, second = secrets.token_hex(16), secrets.token_hex(16)
        claimant = Claimant("", "check", os.getpid())
        self.acquire(key, first, 10.0, claimant)
        self.renew(key, first, 10.0)
        place = self.acquire(key, second, 10.0, claimant, Place()).place
        self.release(key, first)
        if place:
            self.await_turn(key, place, 1.0)
        self.release(key, second, place=place)

    def concerns(self) -> list[str]:
        """What may cost locks here although :meth:`check` passes, one line each, for people."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Give connections back; a later call connects again."""

    @abstractmethod
    def __str__(self) -> str:
        """Where the store is, for people; never with a password."""
