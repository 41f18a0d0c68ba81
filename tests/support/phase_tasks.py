"""Tasks whose phase begins at their publish; see worker_app."""

from __future__ import annotations

from celery import Task

from celery_singleton_lock import SingletonTask
from worker_app import _recorded, _wait_at_gate, by_label, task

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
            raise self.retry(countdown=3.0)
    return label


class Refusing(Task):
    """A base class whose hook refuses a run before its lock is asked for."""

    def before_start(self, task_id, args, kwargs):
        """Refuse."""
        raise PermissionError("not today")


class RefusingSingletonTask(SingletonTask, Refusing):
    """Asks its other base first, as hooks do that call the next one."""


@task(
    name="phase_tasks.refuse_once",
    base=RefusingSingletonTask,
    lock_name="worker_app.label",
    lock_args="label",
    **once,
)
def refuse_once(label):
    """Never runs."""
