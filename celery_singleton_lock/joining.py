"""How a run that has joined another one comes by the outcome of that one, without its body."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn

from celery import Task, states

from .conflict import requeue_delay
from .errors import LockHeldError, StoreError
from .keys import beside
from .lease import Lease
from .locks import AppLocks
from .outage import ask_store, send_back
from .publishing import Waiting
from .results import StoredOutcome, fail_followers, stored_outcome
from .stores.base import Claimant

logger = logging.getLogger(__name__)

#: Seconds that a run waits for an outcome although the lock is free. Results are stored before the
#: release, so what can still come is that of a redelivered copy, or of a retry without delay.
JOIN_GRACE = 2.0
#: Seconds that it is known who ran in the place of a run that left no outcome: others that have
#: joined that one are back within the longest delay of a requeue, if their queue is not stuck.
STAND_IN_LIVES = 600.0


def await_outcome(task: Any, locks: AppLocks, key: str) -> StoredOutcome | None:
    """The outcome of the run that the current one has joined; ``None``: ask for the lock.

    Raises:
        PutBack: Neither yet; the run is in its queue again.
    """
    outcome = stored_outcome(task, Waiting.of(task.request).joined)
    if outcome.is_sharable:
        return outcome
    if ask_store(task, locks, lambda: locks.store.holder(key)) is not None:
        return None
    waiting = Waiting.of(task.request)
    outcome = stored_outcome(task, waiting.joined)  # it may have ended in between
    if outcome.is_sharable:
        return outcome
    left = JOIN_GRACE - waiting.free_for
    if not (outcome.is_none_ever or waiting.place or left <= 0):
        _wait_with_lock_free(task, locks, waiting, left)
    return None


def _wait_with_lock_free(task: Any, locks: AppLocks, waiting: Waiting, left: float) -> NoReturn:
    countdown = min(requeue_delay(waiting.requeues), left)
    message = (
        f"Task {task.name}[{task.request.id}] waits for the outcome of {waiting.joined}, "
        "although the lock is free"
    )
    logger.info(message)
    send_back(task, locks, countdown, waiting.with_lock_free(countdown), LockHeldError(message))


def outcome_in_hand(
    task: Any, lease: Lease, claimant: Claimant, joined: str
) -> StoredOutcome | None:
    """The same for a run that has the lock by now, and keeps others out; ``None``: run the body.

    Of many that have joined a run which left no outcome, the first runs in its place. Those that
    come when that one is over find its name here.
    """
    met = set()
    while joined not in met:
        met.add(joined)
        outcome = stored_outcome(task, joined)
        if outcome.is_sharable:
            return outcome
        try:
            answer = lease.store.acquire(
                f"{beside(lease.key, 'instead')}:{joined}",
                lease.claim.owner_token,
                STAND_IN_LIVES,
                claimant,
            )
        except StoreError:
            return None  # one body too many is better than none
        if answer.is_acquired or answer.holder.task_id == claimant.task_id:
            return None
        joined = answer.holder.task_id
    return None


def end_as(task: Any, joined: str, outcome: StoredOutcome) -> None:
    """Have the current run end as the one that it has joined: see :func:`share_outcomes`.

    Raises:
        Exception: That one's; whoever would have followed the current run is told.
    """
    request = task.request
    logger.info("Task %s[%s] ends with the outcome of %s", task.name, request.id, joined)
    if outcome.state == states.FAILURE:
        fail_followers(task, outcome.result)
        raise outcome.result
    request.singleton_shared = (outcome.result,)


def share_outcomes(task_class: Any) -> None:
    """Give the class a ``__call__`` that returns the value of a joined run in place of the body's.

    Only there: Celery's tracer calls ``run`` itself where no class of a task has a ``__call__``.
    """
    own = vars(task_class).get("__call__")
    if hasattr(own, "singleton_own"):
        return  # it was bound to another app before
    theirs = _next_call(task_class)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        is_traced, shared = _call_of_tracer(self.request_stack.top)
        if shared:
            return shared[0]
        if theirs:
            return theirs(self, *args, **kwargs)
        # Celery's own would cost 9 µs more, and give the body a copy of its request.
        return self.run(*args, **kwargs) if is_traced else Task.__call__(self, *args, **kwargs)

    __call__.singleton_own = own  # type: ignore[attr-defined]
    task_class.__call__ = __call__


def _call_of_tracer(request: Any) -> tuple[bool, tuple[Any, ...]]:
    """Whether this call is the one that Celery makes for ``request``, and what it is to return."""
    if request is None or request.called_directly or "singleton_called" in vars(request):
        return False, ()  # of a body or a hook: a direct call
    request.singleton_called = True
    return True, vars(request).pop("singleton_shared", ())


def _next_call(task_class: Any) -> Callable[..., Any] | None:
    """The ``__call__`` that ours comes before; ``None`` for Celery's own."""
    for owner in task_class.__mro__:
        call = vars(owner).get("__call__")
        call = getattr(call, "singleton_own", call)  # of another class of this kind
        if owner is Task or call is not None:
            return None if owner is Task else call
    return None
