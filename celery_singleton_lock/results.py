"""What the callers of a run that did not run are told."""

from __future__ import annotations

from typing import Any, cast

from celery import states
from celery.exceptions import Ignore, TaskRevokedError
from celery.result import EagerResult

from .errors import LockHeldError


class DuplicateTaskError(LockHeldError, TaskRevokedError):
    """The run was skipped, because another one holds the lock; ``holder`` says which.

    ``.get()`` on the skipped run's result raises it. It is also Celery's ``TaskRevokedError``:
    whoever handles revoked tasks handles skipped ones.
    """


class Skipped(Ignore):
    """Strictly between the pool and the worker's main process: this run was skipped.

    Or, of an eager run, between it and its caller; ``error`` is what that one is told.
    """

    error: DuplicateTaskError | None = None


class PutBack(Ignore):
    """Strictly between the pool and the worker's main process: this run went back to the queue."""


def store_skipped(task: Any, error: DuplicateTaskError) -> None:
    """Store REVOKED for the current run, and tell its chord and the rest of its chain.

    Celery's ``mark_as_revoked`` would store its own exception, without a holder, and leave the
    rest of the chain PENDING for ever.
    """
    request = task.request
    task.backend.mark_as_failure(
        request.id,
        error,
        request=request,
        store_result=not _ignores_result(task, request),
        call_errbacks=False,
        state=states.REVOKED,
    )


def eager_outcome(result: Any, throw: bool) -> Any:
    """The result of an eager run as of a worker's: REVOKED, if it was skipped.

    Raises:
        DuplicateTaskError: It was skipped, and its errors are to be raised.
    """
    error = getattr(result.result, "error", None) if isinstance(result.result, Skipped) else None
    if error is None:
        return result
    if throw:
        raise error
    return EagerResult(result.id, error, states.REVOKED)


def is_finished(task: Any, task_id: str) -> bool:
    """Whether an outcome of this run is stored; False where nobody can tell."""
    return _stored_state(task, task_id) in states.READY_STATES


def has_succeeded(task: Any, task_id: str) -> bool:
    """Whether SUCCESS is stored for this run. Only that says that its message is done with.

    FAILURE does not: ``acks_on_timeout=False`` stores it and then requeues the message.
    """
    return bool(_stored_state(task, task_id) == states.SUCCESS)


def _stored_state(task: Any, task_id: str) -> str | None:
    try:
        return cast(str, task.backend.get_state(task_id))
    except Exception:
        return None  # there is no result backend, or none that can be asked, or it is away


def _ignores_result(task: Any, request: Any) -> bool:
    # Celery's Context has a class-level default that looks like an explicit False.
    said_by_caller = vars(request).get("ignore_result")
    return bool(task.ignore_result if said_by_caller is None else said_by_caller)
