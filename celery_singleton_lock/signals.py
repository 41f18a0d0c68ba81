"""What happened to locks, for metrics and tracing.

Connect as to Celery's own signals; ``sender`` is the task::

    @lock_refused.connect
    def count(sender, event, **kwargs):
        refused.labels(sender.name, event.outcome).inc()

Receivers run in the worker process (``lease_lost``: in its renewal thread), between Celery's
own hooks: keep them short. What they raise is logged by Celery and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from celery.utils.dispatch import Signal

from .errors import Holder


@dataclass(frozen=True)
class LockEvent:
    """What a receiver gets as ``event``.

    Attributes:
        task_name: The task whose run it is about.
        task_id: The id of that run.
        lock_key: The lock.
        fencing_token: The run's own; 0 for a run that was refused.
        holder: ``lock_refused`` only: who has the lock.
        outcome: ``lock_refused`` only: what becomes of the run: ``"skip"``, ``"fail"``,
            ``"requeue"``, ``"wait"`` or ``"join"``.
    """

    task_name: str
    task_id: str
    lock_key: str
    fencing_token: int = 0
    holder: Holder | None = None
    outcome: str | None = None


#: A run has the lock; its body starts now.
lock_acquired = Signal(name="lock_acquired", providing_args={"event"})
#: A run met a held lock and does not execute; or not yet: a run that stands in line tells it when
#: it begins to, and again if it leaves without the lock.
lock_refused = Signal(name="lock_refused", providing_args={"event"})
#: A run gave its lock back.
lock_released = Signal(name="lock_released", providing_args={"event"})
#: A lease ended although its run goes on: another run may have the lock.
lease_lost = Signal(name="lease_lost", providing_args={"event"})
