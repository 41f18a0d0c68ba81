"""Tasks that meet a held lock, one per conflict policy, and the parts around them in a canvas.

All of them note their runs under one label; those that lock share its lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from celery_singleton_lock import Conflict
from history import Run
from worker_app import _recorded, _wait_at_gate, by_label, history, task


@by_label(on_conflict="skip")
def hold(self, label, is_to_fail):
    """Has the lock until its gate is opened."""
    with _recorded(self, label):
        _wait_at_gate(label)
    if is_to_fail:
        raise KeyError(label)


def as_told(conflict: Conflict) -> str:
    """A conflict policy that answers with an argument of the call."""
    label, _, answer = conflict.args
    runs = {run.task_id for run in history().runs(label)}
    is_next_in_line = not conflict.holder.fencing_token  # and has not had the lock
    is_seen = is_next_in_line or conflict.holder.task_id in runs
    return answer if is_seen else "it does not see the holder"


def _duplicate(self: Any, label: str, part: str, answer: str) -> str:
    with _recorded(self, label):
        return part


def duplicate_task(name: str, on_conflict: str | Callable[[Conflict], str], **options: Any) -> Any:
    """A task with that body."""
    name = f"conflict_tasks.duplicate_{name}"
    return by_label(name=name, on_conflict=on_conflict, **options)(_duplicate)


#: By what is said of the conflict, and whether their start is stored.
DUPLICATES = {
    (name, is_tracked): duplicate_task(
        name + "_tracked" * is_tracked, on_conflict, track_started=is_tracked
    )
    for name, on_conflict in {
        "skip": "skip",
        "fail": "fail",
        "requeue": "requeue",
        "wait": "wait",
        "callable": as_told,
    }.items()
    for is_tracked in (False, True)
}


def _share(self: Any, label: str, part: str, is_to_fail: bool) -> str:
    """Runs until its gate is opened; the holder and its duplicates are one call of it."""
    with _recorded(self, label):
        _wait_at_gate(label)
    if is_to_fail:
        raise KeyError(label)
    return part


#: By whether their start is stored.
SHARED = {
    is_tracked: by_label(
        name="conflict_tasks.share" + "_tracked" * is_tracked,
        on_conflict="join",
        track_started=is_tracked,
    )(_share)
    for is_tracked in (False, True)
}


@task(bind=True)
def step(self, label, part):
    """Any other part; takes no lock."""
    with _noted(self, label):
        return part


@task(bind=True)
def failing_step(self, label, part):
    """The same, and fails."""
    with _noted(self, label):
        raise KeyError(part)


def _noted(self: Any, label: str) -> AbstractContextManager[None]:
    run = Run(self.name, self.request.id, label, os.getpid(), 0, 0, time.monotonic())
    return history().recorded(run)
