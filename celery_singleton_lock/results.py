"""What the callers of a run that did not run are told."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, cast

from celery import states
from celery.exceptions import Ignore, TaskRevokedError

from .errors import LockHeldError


class DuplicateTaskError(LockHeldError, TaskRevokedError):
    """The run was skipped, because another one holds the lock; ``holder`` says which.

    ``.get()`` on the skipped run's result raises it. It is also Celery's ``TaskRevokedError``:
    whoever handles revoked tasks handles skipped ones.
    """


class Skipped(Ignore):
    """Strictly between the pool and the worker's main process: this run was skipped."""


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


def is_finished(task: Any, task_id: str) -> bool:
    """Whether an outcome of this run is stored; False where nobody can tell."""
    return _stored_meta(task, task_id).get("status") in states.READY_STATES


def has_succeeded(task: Any, task_id: str, since: float = 0.0) -> bool:
    """Whether SUCCESS was stored for this run after ``since``, in seconds since the epoch.

    Only SUCCESS says that its message is done with. FAILURE does not:
    ``acks_on_timeout=False`` stores it and then requeues the message.
    """
    meta = _stored_meta(task, task_id)
    return meta.get("status") == states.SUCCESS and _date_done(meta) >= since


def _date_done(meta: Mapping[str, Any]) -> float:
    date_done = meta.get("date_done")
    if isinstance(date_done, str):
        date_done = datetime.fromisoformat(date_done)
    if date_done is None:
        return 0.0
    if date_done.tzinfo is None:
        date_done = date_done.replace(tzinfo=timezone.utc)  # from a database
    return float(date_done.timestamp())


def _stored_meta(task: Any, task_id: str) -> Mapping[str, Any]:
    try:
        return cast(Mapping[str, Any], task.backend.get_task_meta(task_id))
    except Exception:
        return {}  # there is no result backend, or none that can be asked, or it is away


def _ignores_result(task: Any, request: Any) -> bool:
    # Celery's Context has a class-level default that looks like an explicit False.
    said_by_caller = vars(request).get("ignore_result")
    return bool(task.ignore_result if said_by_caller is None else said_by_caller)
