"""What becomes of a run that meets a held lock.

A policy sees one frozen :class:`Conflict` and answers with an outcome; it touches no store,
no broker and no task. Whoever asked acts on the outcome.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from .errors import ConfigurationError, Holder

#: Seconds of the first put-back's delay, and of the longest. The longest stays far below any
#: sensible visibility timeout: on Redis a delayed message sits unacknowledged in a worker.
SHORTEST_DELAY = 0.1
LONGEST_DELAY = 5.0
#: Seconds that a run waits in its slot where no ``wait_timeout`` is said.
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Conflict:
    """All that a conflict policy may know.

    Attributes:
        task_name: The task that met the lock.
        task_id: The id of its run.
        lock_key: The lock.
        holder: Who has it, or is next in line for it.
        is_holder_queued: Whether the holder is in its queue: the lock is kept for its retry, or was
            reserved when it was published.
        is_same_call: Whether the holder is the same task with the same arguments, all of them;
            told only where ``on_conflict`` is ``"join"`` or a callable, or with a ``lock_phase``
            that begins at the publish.
        is_newest: ``"rerun"`` only: whether none that is newer has met the lock meanwhile.
        is_superseded: ``"rerun"`` only: whether a newer one, the holder, has had the lock.
        retries: How many of its retries the run has used.
        is_redelivered: Whether the broker delivers this message not for the first time.
        is_eager: Whether it runs in the caller's process, with no queue to go back to.
        requeues: How often it has been put back already.
        delay: Seconds until its next try, if it goes back to the queue.
        waited: Seconds since its first conflict; 0.0 at the first.
        wait_timeout: The task's ``wait_timeout``; ``None`` for the policy's own.
        args: The call's positional arguments; left out of the representation, as ``kwargs`` is:
            arguments may be secrets.
        kwargs: The call's keyword arguments.
    """

    task_name: str
    task_id: str
    lock_key: str
    holder: Holder
    is_holder_queued: bool = False
    is_same_call: bool = False
    is_newest: bool = False
    is_superseded: bool = False
    retries: int = 0
    is_redelivered: bool = False
    is_eager: bool = False
    requeues: int = 0
    delay: float = SHORTEST_DELAY
    waited: float = 0.0
    wait_timeout: float | None = None
    args: Sequence[Any] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_with_itself(self) -> bool:
        """The holder has this run's task id: another copy of its message, or an earlier attempt."""
        return bool(self.task_id) and self.holder.task_id == self.task_id

    @property
    def was_under_way(self) -> bool:
        """A retry or a redelivered copy: its body has run before, or may have."""
        return self.retries > 0 or self.is_redelivered

    @property
    def was_let_in_before(self) -> bool:
        """Under way, or put back before: its caller was promised an outcome."""
        return self.was_under_way or self.requeues > 0


@dataclass(frozen=True)
class Skip:
    """The run ends at once, as REVOKED."""

    name = "skip"


@dataclass(frozen=True)
class Fail:
    """The run ends as an error."""

    reason: str
    name = "fail"


@dataclass(frozen=True)
class Requeue:
    """The run goes back to the queue, to be delivered again after ``countdown`` seconds."""

    countdown: float
    name = "requeue"


@dataclass(frozen=True)
class Join(Requeue):
    """The run goes back to the queue, and waits there for the outcome of the lock's holder."""

    name = "join"


@dataclass(frozen=True)
class Wait:
    """The run stands in line in its slot, so many seconds at most."""

    seconds: float
    name = "wait"


Outcome = Union[Skip, Fail, Requeue, Join, Wait]
Policy = Callable[[Conflict], Outcome]
#: A policy's name, or a callable that sees the conflict and returns one.
OnConflict = Union[str, Callable[[Conflict], str]]


def skip(conflict: Conflict) -> Outcome:
    """One run is enough: this one ends at once."""
    return Skip()


def fail(conflict: Conflict) -> Outcome:
    """A second run is a mistake: tell the caller."""
    return Fail("its on_conflict is 'fail'")


def requeue(conflict: Conflict) -> Outcome:
    """Every run counts: try again later, until ``wait_timeout``."""
    if conflict.wait_timeout is None:
        return Requeue(conflict.delay)
    left = conflict.wait_timeout - conflict.waited
    return Requeue(min(conflict.delay, left)) if left > 0 else _waited_too_long(conflict)


def wait(conflict: Conflict) -> Outcome:
    """Every run counts, and soon: stand in line in the slot, until ``wait_timeout``.

    Not for a holder that is itself in its queue: all slots could be waiting for a run that has
    none.
    """
    timeout = LONGEST_WAIT if conflict.wait_timeout is None else conflict.wait_timeout
    left = timeout - conflict.waited
    if left <= 0:
        return _waited_too_long(conflict)
    return Requeue(min(conflict.delay, left)) if conflict.is_holder_queued else Wait(left)


def rerun(conflict: Conflict) -> Outcome:
    """One further run is enough, with the newest arguments: the others end at once."""
    return Requeue(conflict.delay) if conflict.is_newest else Skip()


def join(conflict: Conflict) -> Outcome:
    """One run is enough, and all share its outcome: wait for it in the queue.

    What is no run of the same call has no outcome to share: go back to the queue for the lock.
    """
    outcome = requeue(conflict)
    is_run_of_same_call = conflict.is_same_call and conflict.holder.task_id
    if isinstance(outcome, Requeue) and is_run_of_same_call:
        return Join(outcome.countdown)
    return outcome


def _waited_too_long(conflict: Conflict) -> Fail:
    return Fail(f"it has waited {conflict.waited:.1f} s, its wait_timeout is over")


POLICIES: dict[str, Policy] = {
    "skip": skip,
    "fail": fail,
    "requeue": requeue,
    "wait": wait,
    "rerun": rerun,
    "join": join,
}
#: Those that know themselves when to send away a run that was put back.
_PATIENT = (requeue, wait, rerun, join)
#: The store has to know them before the first conflict: a callable names another one.
_NOT_FOR_CALLABLES = ("rerun",)


def policy_name(on_conflict: OnConflict, conflict: Conflict) -> str:
    """The policy that ``on_conflict`` names for this conflict.

    Raises:
        ConfigurationError: A callable returned something that is no policy's name.
    """
    name = on_conflict(conflict) if callable(on_conflict) else on_conflict
    if callable(on_conflict) and name not in names_for_callables():
        raise ConfigurationError(
            f"The on_conflict callable of task {conflict.task_name} returned {name!r}; "
            f"it must return one of {', '.join(map(repr, names_for_callables()))}"
        )
    return name


def decide(name: str, conflict: Conflict) -> Outcome:
    """What becomes of the run under the policy of that name.

    A run never loses to itself, and whoever was let in before is not sent away (R5): such a run
    goes back to the queue whatever the policy says. ``expires`` bounds that; ``wait_timeout``
    only bounds the waiting of a run that was not under way before. Only an update that a newer
    one has overtaken ends in any case: it would undo what that one did. An eager run has no
    queue: it waits where it is.
    """
    policy = POLICIES[name]
    if conflict.is_superseded:
        return Skip()
    outcome = Requeue(conflict.delay) if conflict.is_with_itself else policy(conflict)
    is_to_come_back = conflict.was_under_way or (
        conflict.was_let_in_before and policy not in _PATIENT
    )
    if isinstance(outcome, (Skip, Fail)) and is_to_come_back:
        outcome = Requeue(conflict.delay)
    if not conflict.is_eager or not isinstance(outcome, Requeue):
        return outcome
    if conflict.is_with_itself or conflict.is_holder_queued:
        return Fail("an eager run has no queue to go back to")
    return wait(conflict)


def requeue_delay(requeues: int) -> float:
    """Seconds until the next try: growing, and spread so that many waiters do not come at once."""
    longest = min(LONGEST_DELAY, SHORTEST_DELAY * 2.0 ** min(requeues, 30))
    return random.uniform(longest / 2, longest)


def names_for_callables() -> list[str]:
    """The names of the policies that a callable may return."""
    return [name for name in POLICIES if name not in _NOT_FOR_CALLABLES]


def policy_names() -> str:
    """The names of the policies, for error messages."""
    return ", ".join(repr(name) for name in POLICIES)
