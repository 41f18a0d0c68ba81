"""What users see of the types. Read by mypy, never run."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery

from celery_singleton_lock import (
    Conflict,
    DuplicateTaskError,
    Holder,
    LockEvent,
    SingletonResult,
    SingletonTask,
    lock,
)
from celery_singleton_lock.django import DjangoSingletonTask
from celery_singleton_lock.signals import lock_refused


class Buy(SingletonTask):
    """Options are typed attributes."""

    lock_args = ("sku",)
    lock_ttl = timedelta(seconds=5)
    wait_timeout = 60
    on_conflict = "requeue"

    def run(self, sku: str, quantity: int) -> int:
        self.lease.check()
        token: int = self.lease.fencing_token
        lost: bool = self.lease.is_lost
        return token if lost else quantity


def policy(conflict: Conflict) -> str:
    holder: Holder = conflict.holder
    return "fail" if holder.pid == 1 else "skip"


class ByCallable(SingletonTask):
    """So are callables."""

    lock_args = staticmethod(lambda sku: sku)
    on_conflict = staticmethod(policy)


class OnCommit(DjangoSingletonTask):
    """So are those of a Django project."""

    lock_args = "sku"


class Rebuild(SingletonTask):
    """So are the phases that begin at the publish."""

    lock_phase = "lifetime"
    lock_reservation_ttl = timedelta(hours=2)


def who_does_it(result: SingletonResult) -> str | None:
    return result.holder.task_id if result.is_duplicate and result.holder else None


def publish(task: OnCommit) -> None:
    task.delay_on_commit("anvil")
    task.apply_async_on_commit(("anvil",), countdown=1)


def handle(error: DuplicateTaskError) -> str | None:
    return error.holder.task_id if error.holder else None


def count(sender: SingletonTask, event: LockEvent, **kwargs: object) -> str | None:
    return event.outcome


lock_refused.connect(count)


def by_hand(app: Celery, task: Buy) -> int | None:
    with lock(app, "inventory", "anvil") as lease:
        lease.check()
    taken = task.lock("anvil", 1).acquire(wait_timeout=timedelta(seconds=1))
    if taken is None:
        holder: Holder | None = task.holder("anvil", 1)
        return holder.pid if holder else None
    taken.release()
    return lease.fencing_token
