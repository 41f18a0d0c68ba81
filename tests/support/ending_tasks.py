"""Tasks whose runs end in every way there is, as the call says.

It says ``"place: what happens there"``, for several places with ``"; "`` in between. Places are
the body and the hooks. All these tasks share one lock per label.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from celery_singleton_lock import SingletonTask
from history import KEPT_FOR
from worker_app import _client, _recorded, _wait_at_gate, locked_task

#: Seconds that the lock of a worker which was killed lives on.
SHORT_TTL = 2.0


class RetriedError(Exception):
    """What ``autoretry_for`` names."""


class EndingTask(SingletonTask):
    """Its hooks do what the call says, each after what it has to do for the lock."""

    def before_start(self, task_id, args, kwargs):
        super().before_start(task_id, args, kwargs)
        self._act("before_start", *args)

    def on_success(self, retval, task_id, args, kwargs):
        self._act("on_success", *args)

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        self._act("on_failure", *args)

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        self._act("on_retry", *args)

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        self._act("before after_return", *args)
        super().after_return(status, retval, task_id, args, kwargs, einfo)
        self._act("after_return", *args)

    def _act(self, place: str, label: str, how: str) -> Any:
        action = dict(part.split(": ") for part in how.split("; ")).get(place)
        return action and ACTIONS[action](self, label)


class BrokenBackend:
    """A result backend that cannot store a success.

    Args:
        backend: Does everything else.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def mark_as_done(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("the result backend is broken")


class FailsToStore(EndingTask):
    """Its results cannot be stored."""

    @property
    def backend(self):
        return BrokenBackend(super().backend)


def _body(self, label, how):
    with _recorded(self, label):
        return self._act("body", label, how) or label


def ending_task(name: str, **options: Any) -> Any:
    """A task with that body; ``options`` are Celery's and ours."""
    options = {"base": EndingTask, "max_retries": 1, "default_retry_delay": 0, **options}
    lock = {"lock_name": "worker_app.label", "lock_args": "label", "on_conflict": "skip"}
    return locked_task(name=f"ending_tasks.{name}", **lock, **options)(_body)


end = ending_task("end")
end_late = ending_task("end_late", acks_late=True)
end_rejecting = ending_task("end_rejecting", acks_late=True, reject_on_worker_lost=True)
end_retrying = ending_task("end_retrying", acks_late=True, retry_on_worker_lost=True)
end_requeued = ending_task(
    "end_requeued", acks_late=True, acks_on_failure_or_timeout=False, reject_on_worker_lost=True
)
end_autoretried = ending_task("end_autoretried", autoretry_for=(RetriedError,), retry_backoff=False)
end_unstored = ending_task("end_unstored", base=FailsToStore)
end_rarely = ending_task("end_rarely", acks_late=True, lock_at_least_for=10.0)
#: For workers that are killed: nobody can see that but the ttl.
end_with_ttl = ending_task("end_with_ttl", lock_ttl=SHORT_TTL)
end_late_with_ttl = ending_task("end_late_with_ttl", acks_late=True, lock_ttl=SHORT_TTL)


def _is_first(label: str) -> bool:
    """Whether no earlier run of this label has asked."""
    name = f"worker_app:asked:{label}"
    client = _client(os.getpid())
    count = client.incr(name)
    client.expire(name, KEPT_FOR)
    return bool(count == 1)


@contextmanager
def _lingering() -> Iterator[None]:
    """Keeps a body that has sent itself again, so that the new message meets the old lock."""
    try:
        yield
    finally:
        time.sleep(0.2)


def _raise(error: type[BaseException], self: Any, label: str, *args: Any, **kwargs: Any) -> None:
    raise error(*args, **kwargs)


def _reject_to_the_queue_once(self: Any, label: str) -> None:
    if _is_first(label):
        raise Reject("not now", requeue=True)


def _retry(self: Any, label: str) -> None:
    with _lingering():
        raise self.retry(countdown=0)


def _retry_once(self: Any, label: str) -> None:
    if self.request.retries == 0:
        _retry(self, label)


def _retry_and_go_on(self: Any, label: str) -> None:
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
        time.sleep(0.5)


def _raise_what_is_retried_once(self: Any, label: str) -> None:
    if self.request.retries == 0:
        raise RetriedError


def _replace_once(self: Any, label: str) -> None:
    if _is_first(label):
        with _lingering():
            raise self.replace(end.si(label, "body: return"))


def _wait(self: Any, label: str) -> None:
    _wait_at_gate(label)


def _wait_once(self: Any, label: str) -> None:
    if _is_first(label):
        _wait_at_gate(label)


def _catch_the_soft_limit(self: Any, label: str) -> str:
    try:
        _wait_at_gate(label)
    except SoftTimeLimitExceeded:
        return "caught"
    return "not reached"


def _ignore_the_end(self: Any, label: str) -> None:
    while True:
        try:
            print("From here on the end is ignored")
            return _wait_at_gate(label)
        except (SystemExit, SoftTimeLimitExceeded):
            print("The end is ignored")


def _hold_the_gil(self: Any, label: str) -> None:
    """Spends 2 s at least in one C call; signals wait for its end."""
    began = time.process_time()
    sum(repeat(1, 10_000_000))
    sum(repeat(1, int(10_000_000 * 2 / (time.process_time() - began))))


def _kill(number: int, self: Any, label: str) -> None:
    os.kill(os.getpid(), number)
    _wait_at_gate(label)  # SIGTERM comes between two instructions


def _kill_once(number: int, self: Any, label: str) -> None:
    if _is_first(label):
        _kill(number, self, label)


def _crash(self: Any, label: str) -> None:
    ctypes.string_at(0)


def _sleep(seconds: float, self: Any, label: str) -> None:
    time.sleep(seconds)


ACTIONS = {
    "return": lambda self, label: label,
    "raise": partial(_raise, KeyError),
    "Ignore": partial(_raise, Ignore),
    "Reject": partial(_raise, Reject, reason="not wanted"),
    "Reject to the queue, once": _reject_to_the_queue_once,
    "retry": _retry,
    "retry, once": _retry_once,
    "retry and go on": _retry_and_go_on,
    "raise what is retried, once": _raise_what_is_retried_once,
    "replace, once": _replace_once,
    "wait": _wait,
    "wait, once": _wait_once,
    "wait, catch the soft limit": _catch_the_soft_limit,
    "wait, ignore the end": _ignore_the_end,
    "hold the GIL": _hold_the_gil,
    "SystemExit": partial(_raise, SystemExit),
    "KeyboardInterrupt": partial(_raise, KeyboardInterrupt),
    "MemoryError": partial(_raise, MemoryError),
    "return what cannot be stored": lambda self, label: object(),
    "exit": lambda self, label: os._exit(1),
    "crash": _crash,
    "kill itself": partial(_kill, signal.SIGKILL),
    "kill itself, once": partial(_kill_once, signal.SIGKILL),
    "terminate itself": partial(_kill, signal.SIGTERM),
    "sleep for 1.5 s": partial(_sleep, 1.5),
    "sleep for 3 s": partial(_sleep, 3.0),
}
