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


@dataclass(frozen=True)
class Conflict:
    """All that a conflict policy may know.

    Attributes:
        task_name: The task that met the lock.
        task_id: The id of its run.
        lock_key: The lock.
        holder: Who has it.
        retries: How many of its retries the run has used.
        is_redelivered: Whether the broker delivers this message not for the first time.
        is_eager: Whether it runs in the caller's process, with no queue to go back to.
        requeues: How often it has been put back already.
        waited: Seconds since its first conflict; 0.0 at the first.
        wait_timeout: The task's ``wait_timeout``; ``None`` for no limit.
        args: The call's positional arguments; left out of the representation, as ``kwargs`` is:
            arguments may be secrets.
        kwargs: The call's keyword arguments.
    """

    task_name: str
    task_id: str
    lock_key: str
    holder: Holder
    retries: int = 0
    is_redelivered: bool = False
    is_eager: bool = False
    requeues: int = 0
    waited: float = 0.0
    wait_timeout: float | None = None
    args: Sequence[Any] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_with_itself(self) -> bool:
        """The holder has this run's task id: another copy of its message, or an earlier attempt."""
        return bool(self.task_id) and self.holder.task_id == self.task_id

    @property
    def was_let_in_before(self) -> bool:
        """A retry, a redelivered copy, or put back before: its caller was promised an outcome."""
        return self.retries > 0 or self.is_redelivered or self.requeues > 0


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


Outcome = Union[Skip, Fail, Requeue]
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
    delay = requeue_delay(conflict.requeues)
    if conflict.wait_timeout is None:
        return Requeue(delay)
    left = conflict.wait_timeout - conflict.waited
    if left <= 0:
        return Fail(f"it has waited {conflict.waited:.1f} s, its wait_timeout is over")
    return Requeue(min(delay, left))


POLICIES: dict[str, Policy] = {"skip": skip, "fail": fail, "requeue": requeue}


def decide(on_conflict: OnConflict, conflict: Conflict) -> Outcome:
    """What becomes of the run.

    A run never loses to itself, and whoever was let in before is not sent away (R5): such a run
    goes back to the queue whatever the policy says. ``expires`` bounds that.

    Raises:
        ConfigurationError: A callable returned something that is no policy's name.
    """
    name = on_conflict(conflict) if callable(on_conflict) else on_conflict
    if name not in POLICIES:
        raise ConfigurationError(
            f"The on_conflict callable of task {conflict.task_name} returned {name!r}; "
            f"it must return one of {policy_names()}"
        )
    outcome = POLICIES[name](conflict)
    if conflict.is_with_itself or (conflict.was_let_in_before and name != "requeue"):
        outcome = Requeue(requeue_delay(conflict.requeues))
    if isinstance(outcome, Requeue) and conflict.is_eager:
        return Fail("an eager run has no queue to go back to")
    return outcome


def requeue_delay(requeues: int) -> float:
    """Seconds until the next try: growing, and spread so that many waiters do not come at once."""
    longest = min(LONGEST_DELAY, SHORTEST_DELAY * 2.0 ** min(requeues, 30))
    return random.uniform(longest / 2, longest)


def policy_names() -> str:
    """The names of the policies, for error messages."""
    return ", ".join(repr(name) for name in POLICIES)
