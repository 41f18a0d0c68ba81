"""One run's time-bounded claim on a lock.

A lease alone combines a store with time. It goes by its own monotonic clock, from the moment
before the store was asked: by then the store's ttl has not begun, so the lease always thinks
itself over before the store does (C. Gray, D. Cheriton, "Leases", SOSP 1989, section 5).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from enum import Enum, auto

from .errors import Holder, LeaseLostError, StoreError
from .stores.base import (
    PLACE_LIVES,
    UNTOLD,
    Acquisition,
    Claim,
    Claimant,
    Generation,
    LockStore,
    Place,
    Reserved,
)

#: Seconds; one who stands in line shows this often that it is alive: twice before its place lapses.
SHOW_EVERY = PLACE_LIVES / 3


def new_owner_token() -> str:
    """The secret of one execution: of a delivery, not of a task id, which redelivery repeats."""
    return secrets.token_hex(16)


class _State(Enum):
    """Where a lease is in its life.

    ASKED and RELEASING: the store was asked, and its answer is not known (yet). IN_LINE: refused,
    and it stands in the lock's line.
    """

    NEW = auto()
    ASKED = auto()
    IN_LINE = auto()
    HELD = auto()
    REFUSED = auto()
    LOST = auto()
    RELEASING = auto()
    RELEASED = auto()


class Lease:
    """A claim on ``key`` that lives ``ttl`` seconds from the last time the store confirmed it.

    Not promised: that no other run has the lock while ``is_lost`` is false, if this process was
    paused for longer than the ttl. Where that matters, compare ``fencing_token`` at the resource.

    Args:
        store: Where the lock lives.
        key: The lock key.
        ttl: Seconds without renewal until the lock is anyone's.
        claimant: What others are told about this run.
        owner_token: The secret of this execution; made anew unless given.
        at_least_for: Seconds that the lock is kept at least, from when its first attempt took it.
        reserved: What is to be given back once the lock is there.
        generation: How new it is, if only the newest counts.
        clock: Seconds; must not step.

    Attributes:
        key: The lock key.
        ttl: As given.
        on_freed: Called once the lock was given back, whoever does that; not after a loss.
        fencing_token: A number that only grows per key, 0 until acquired. Send it along with
            every write, and let the resource refuse a lower one than it has seen (M. Kleppmann,
            "How to do distributed locking", 2016).
    """

    def __init__(
        self,
        store: LockStore,
        key: str,
        ttl: float,
        claimant: Claimant,
        owner_token: str | None = None,
        at_least_for: float = 0.0,
        reserved: Reserved | None = None,
        generation: Generation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key = key
        self.ttl = ttl
        self.at_least_for = at_least_for
        self.on_freed: Callable[[], object] = lambda: None
        self.fencing_token = 0
        self._store = store
        self._claimant = claimant
        self._reserved = reserved
        self._generation = generation
        self._clock = clock
        # Made before the store is asked: whatever interrupts the asking can still give it back.
        self._owner_token = owner_token or new_owner_token()
        self._state = _State.NEW
        self._expires_at = 0.0
        self._holder: Holder | None = None
        self._epoch = ""
        self._place: Place | None = None
        self._look_in = 0.0
        # Between restore() in the renewal thread and release(): what is given back stays so.
        self._giving_back = threading.Lock()

    @property
    def claim(self) -> Claim:
        """What the store needs to renew this lease."""
        return Claim(self.key, self._owner_token, self.ttl)

    @property
    def store(self) -> LockStore:
        """Where the lock lives."""
        return self._store

    @property
    def pid(self) -> int:
        """The process that it belongs to."""
        return self._claimant.pid

    @property
    def expires_at(self) -> float:
        """When the lease ends if nothing renews it, by its own clock."""
        return self._expires_at

    @property
    def is_held(self) -> bool:
        """Acquired, neither released nor lost."""
        return self._state is _State.HELD and self._clock() < self._expires_at

    @property
    def is_over(self) -> bool:
        """Refused, known to be lost, or given back: there is nothing to renew."""
        return self._state not in (_State.NEW, _State.ASKED, _State.IN_LINE, _State.HELD)

    @property
    def is_lost(self) -> bool:
        """The lease ended before it was released: another run may have the lock now.

        By its own clock, or because the store said so.
        """
        if self._state is _State.HELD:
            return self._clock() >= self._expires_at
        return self._state is _State.LOST

    def acquire(self, place: Place | None = None) -> Acquisition:
        """Ask for the lock, once. After a StoreError it is safe to ask again.

        Args:
            place: Stand there in the lock's line if it is refused; see :meth:`wait`.

        Returns:
            Who has the lock now: this run if ``is_held``.

        Raises:
            StoreError: The store did not answer.
        """
        if place:
            untold = place._replace(number=UNTOLD)
            is_asked_again = self._place is not None and self._place.number == UNTOLD
            place = untold if is_asked_again and not place.number else place
            self._place = place if place.number else untold
        asked_at = self._clock()
        self._state = _State.ASKED
        answer = self._store.acquire(
            self.key,
            self._owner_token,
            self.ttl,
            self._claimant,
            place,
            self._reserved,
            self._generation,
        )
        if self._generation:
            self._generation = self._generation._replace(number=answer.generation)
        self._look_in = answer.look_in
        if not answer.is_acquired:
            self._place = answer.place
            self._state = _State.IN_LINE if answer.place else _State.REFUSED
            return answer
        self._expires_at = asked_at + self.ttl
        if self._clock() >= self._expires_at:
            raise StoreError(f"The lock store {self._store} took longer to answer than the ttl")
        self.fencing_token = answer.holder.fencing_token
        self._holder, self._epoch, self._place = answer.holder, answer.epoch, None
        self._state = _State.HELD
        return answer

    def wait(self, seconds: float) -> Acquisition:
        """Stand in line for so long at most, or until there is reason to look, and ask again.

        Reason to look: the lock was handed over; the lease of its holder would be over now; it
        is time to show the line that this place lives.

        Raises:
            StoreError: The store did not answer.
        """
        place = self._place or Place()
        is_awake = place.number > 0 and place.due_in is None
        seconds = min(seconds, SHOW_EVERY, self._look_in + 0.001)
        if is_awake and seconds > 0:
            self._store.await_turn(self.key, place, seconds)
        return self.acquire(place._replace(due_in=None))

    @property
    def generation(self) -> int:
        """How new it is, once the store has said so; 0 where that is of no matter."""
        return self._generation.number if self._generation else 0

    def keep_place(self) -> None:
        """Have :meth:`release` not leave the line: the run comes again."""
        if self._state is _State.IN_LINE:
            self._state = _State.REFUSED

    def confirm(self, asked_at: float, is_ours: bool) -> None:
        """Take note of the store's answer to a renewal that was sent at ``asked_at``.

        A yes, however late, proves that nobody else had the lock in between: nothing puts an
        owner token back but :meth:`restore`, after a loss of data. After a no the lease stays lost.
        """
        if self._state is not _State.HELD:
            return
        if is_ours:
            self._expires_at = asked_at + self.ttl
        else:
            self._state = _State.LOST

    def restore(self) -> bool:
        """After a renewal was refused: put the lock back if it is the store that has lost it.

        Only while the lease lives by its own clock, so that nobody else could have had the lock
        before the store lost it; never once its release has begun. What the store has to see is
        said in :meth:`LockStore.restore`.

        Returns:
            Whether the lock is this lease's again.

        Raises:
            StoreError: The store did not answer; the lease is as it was.
        """
        with self._giving_back:
            if not self.is_held or self._holder is None or not self._epoch:
                return False
            asked_at = self._clock()
            epoch = self._store.restore(
                self.key, self._owner_token, self.ttl, self._holder, self._epoch
            )
            if epoch is None:
                return False
            self._epoch = epoch
            self._expires_at = asked_at + self.ttl
            return True

    def check(self) -> None:
        """Return if the lease still lives, else raise: call it before what cannot be undone.

        Asks no store: the answer comes from the lease's clock and its last renewal.

        Raises:
            LeaseLostError: The lease has ended, or was given back; another run may have the lock.
        """
        is_given_back = self._state in (_State.RELEASING, _State.RELEASED)
        if self.is_lost or is_given_back:
            how = "was given back" if is_given_back else "ended while its run was still going on"
            raise LeaseLostError(
                f"The lease on {self.key} {how}; another run may have the lock now"
            )

    def hold(self, seconds: float) -> bool:
        """Promise the lock to the next attempt: release() will keep it so long for that one.

        Returns:
            False when the lock was not this lease's any more.

        Raises:
            StoreError: The store did not answer.
        """
        return self._store.hold(self.key, self._owner_token, seconds)

    def release(self) -> bool:
        """Give the lock back, if it was asked for and is not given back already; leave the line.

        Returns:
            Whether this call freed the lock. False also means that it had been lost.

        Raises:
            StoreError: The store did not answer; the lock ends with its ttl.
        """
        with self._giving_back:
            before = self._state
            if before in (_State.NEW, _State.REFUSED, _State.RELEASED):
                return False
            # Renewal must not take the lock's end for a loss. What interrupts the call (a signal)
            # leaves this state behind, and release() can be called again.
            self._state = _State.RELEASING
        try:
            is_freed = self._store.release(
                self.key, self._owner_token, self.at_least_for, self._place
            )
        except StoreError:
            self._state = _State.RELEASED
            raise
        was_held = before in (_State.HELD, _State.LOST)
        self._state = _State.LOST if was_held and not is_freed else _State.RELEASED
        if is_freed:
            self.on_freed()
        return is_freed


class NullLease:
    """Stands for a lease where there is no lock, so that a body can be called without one."""

    fencing_token = 0
    is_lost = False

    def check(self) -> None:
        """Pass: there is nothing to lose."""

    def release(self) -> bool:
        """Do nothing, and say so."""
        return False


class NestedLease:
    """A lease that an enclosing execution holds, as a nested call of the same lock sees it.

    Args:
        enclosing: The lease that is held.
    """

    def __init__(self, enclosing: Lease) -> None:
        self._enclosing = enclosing

    @property
    def fencing_token(self) -> int:
        """The enclosing lease's."""
        return self._enclosing.fencing_token

    @property
    def is_lost(self) -> bool:
        """Whether the enclosing lease is lost."""
        return self._enclosing.is_lost

    def check(self) -> None:
        """Check the enclosing lease."""
        self._enclosing.check()

    def release(self) -> bool:
        """Do nothing: the lock is given back by the execution that took it."""
        return False


class ChildLease:
    """The lease of a run in a child process, as the main process renews it.

    The child renews as well, and only the child notices a loss. But a child can hold its GIL in
    a C call, or be stopped, for longer than the ttl; its lock must not end then (R4).

    Args:
        store: Where the lock lives.
        claim: What it takes to renew it.
        has_ended: Tells whether the body is known to have ended.
    """

    is_lost = False

    def __init__(self, store: LockStore, claim: Claim, has_ended: Callable[[], bool]) -> None:
        self.store = store
        self.claim = claim
        self.key, self.ttl = claim.key, claim.ttl
        self._has_ended = has_ended

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to renew any more."""
        return self._has_ended()

    @property
    def is_held(self) -> bool:
        """Whether to go on. The child may not have asked for its lock yet, so a no is no loss."""
        return not self._has_ended()

    def restore(self) -> bool:
        """Do nothing: the child does it, which knows what its lock was like."""
        return False

    def confirm(self, asked_at: float, is_ours: bool) -> None:
        """Do nothing: see above."""
