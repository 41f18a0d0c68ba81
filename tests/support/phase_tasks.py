"""Tasks whose phase begins at their publish; see worker_app."""

from __future__ import annotations

from celery import Task
from celery.exceptions import Ignore, Reject

from celery_singleton_lock import SingletonTask
from worker_app import _recorded, _wait_at_gate, by_label

once = {"lock_phase": "lifetime", "on_conflict": "skip"}
one_ahead = {"lock_phase": "queued_and_running"}
late = {"acks_late": True, "reject_on_worker_lost": True}


def _hold(self, label):
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


def _task(name, **options):
    return by_label(name=f"phase_tasks.{name}", **options)(_hold)


hold_once = _task("hold_once", **once)
hold_once_late = _task("hold_once_late", **once, **late)
hold_once_briefly_reserved = _task("hold_once_briefly_reserved", **once, lock_reservation_ttl=2.0)
hold_one_ahead = _task("hold_one_ahead", **one_ahead)
hold_one_ahead_impatiently = _task("hold_one_ahead_impatiently", **one_ahead, wait_timeout=0.5)


@by_label(name="phase_tasks.return_at_once", **once)
def return_at_once(self, label):
    """Returns its own task id."""
    with _recorded(self, label):
        return self.request.id


@by_label(name="phase_tasks.retry_after_gate", **once)
def retry_after_gate(self, label, countdown=3.0):
    """Its first attempt ends in a retry."""
    with _recorded(self, label):
        if not self.request.retries:
            raise self.retry(countdown=countdown)
    return label


@by_label(name="phase_tasks.retry_and_go_on", **once)
def retry_and_go_on(self, label):
    """Its first attempt publishes its retry, and ends when its gate is open."""
    with _recorded(self, label):
        if not self.request.retries:
            self.retry(countdown=2.0, throw=False)
            _wait_at_gate(label)
    return label


@by_label(name="phase_tasks.retry_one_ahead", **one_ahead)
def retry_one_ahead(self, label):
    """As retry_after_gate, where one more may wait."""
    with _recorded(self, label):
        if not self.request.retries:
            raise self.retry(countdown=3.0, headers={"mine": 1})
    return label


@by_label(name="phase_tasks.retry_elsewhere", **once)
def retry_elsewhere(self, label, other=None):
    """Its first attempt publishes a retry with another lock, and ends when its gate is open."""
    with _recorded(self, label):
        if other is not None and not self.request.retries:
            self.retry((other,), countdown=1.0, throw=False)
            _wait_at_gate(label)
    return label


class Refusing(Task):
    """A base class whose hook refuses a run before its lock is asked for."""

    def before_start(self, task_id, args, kwargs):
        """Refuse, as the task says."""
        raise self.refusal


class RefusingSingletonTask(SingletonTask, Refusing):
    """Asks its other base first, as hooks do that call the next one."""


#: What such a hook raises → a task that never runs.
REFUSE_ONCE = {
    type(refusal).__name__: by_label(
        name=f"phase_tasks.refuse_once_with_{type(refusal).__name__}",
        base=RefusingSingletonTask,
        refusal=refusal,
        **once,
    )(_hold)
    for refusal in (PermissionError("not today"), Ignore(), Reject("not today"))
}
