"""What is legal, and will bite: said when a worker starts, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .options import LockOptions

#: Seconds until kombu's Redis transport delivers an unacknowledged message anew, by default.
VISIBILITY_TIMEOUT = 3600.0
#: How many tasks a line names.
NAMED = 3


def on_tasks(worker: Any, has_child_processes: bool) -> Iterator[str]:
    """What the tasks that lock may run into on this worker, which is about to start."""
    app = worker.app
    tasks = [task for _, task in sorted(app.tasks.items()) if _locks(task)]
    if has_child_processes:  # no other pool can end a body that hangs
        yield from _on_bodies_without_end(worker, tasks)
    with app.connection_for_read() as connection:  # does not connect
        is_redis = connection.transport.driver_type == "redis"
    if is_redis:
        options = app.conf.broker_transport_options or {}
        visibility = options.get("visibility_timeout", VISIBILITY_TIMEOUT)
        yield from _on_visibility(worker, tasks, visibility)


def _on_bodies_without_end(worker: Any, tasks: Sequence[Any]) -> Iterator[str]:
    if worker.time_limit or worker.soft_time_limit:
        return
    endless = [task for task in tasks if not (task.time_limit or task.soft_time_limit)]
    if endless:
        yield (
            f"No time limit ends {_names(endless)}: the lock of a body that hangs is renewed for "
            "ever, and nobody else gets in. Set task_time_limit, or time_limit on the task"
        )


def _on_visibility(worker: Any, tasks: Sequence[Any], visibility: float) -> Iterator[str]:
    setting = f"The visibility_timeout of broker_transport_options, {visibility:g} s, is below the"
    late = [
        task
        for task in tasks
        if task.acks_late and (task.time_limit or worker.time_limit or 0) > visibility
    ]
    if late:
        yield (
            f"{setting} time limit of {_names(late)}: the broker delivers a message anew whose "
            "run goes on. Set it above the longest time limit"
        )
    delayed = [task for task in tasks if (task.default_retry_delay or 0) > visibility]
    if delayed:
        yield (
            f"{setting} default_retry_delay of {_names(delayed)}: the broker delivers a message "
            "anew that waits for its eta. Set it above the longest delay, of eta and countdown too"
        )


def _locks(task: Any) -> bool:
    return isinstance(getattr(task, "_lock_options", None), LockOptions)


def _names(tasks: Sequence[Any]) -> str:
    names = [task.name for task in tasks[:NAMED]]
    if len(tasks) > NAMED:
        names.append(f"{len(tasks) - NAMED} more")
    return ", ".join(names)
