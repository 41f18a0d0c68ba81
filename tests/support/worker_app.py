"""The app of the worker tests: run by the workers, imported by the tests that send to them.

A worker finds its settings in the environment; the tests' fixture ``app`` gives the same ones
to this process. Nothing is connected at import.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import redis
from celery import Celery, current_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from celery_singleton_lock import Conflict, SingletonTask
from history import KEPT_FOR, History, Run

#: Settings for a worker, as JSON. Celery's own, this package's, and ``history_url``.
ENVIRONMENT_VARIABLE = "WORKER_APP_SETTINGS"
#: What all lock keys of these tasks match, and nobody else's.
LOCK_KEYS = "singleton:*:1:worker_app.*"
#: Seconds after which a body goes on although nobody opened its gate: its test has failed.
LONGEST_HOLD = 25.0

app = Celery("worker_app")
app.conf.update(json.loads(os.environ.get(ENVIRONMENT_VARIABLE, "{}")))

#: Tasks with these options share one lock per label.
BY_LABEL = {
    "base": SingletonTask,
    "bind": True,
    "lock_name": "worker_app.label",
    "lock_args": "label",
}


@app.task(**BY_LABEL)
def hold(self, label):
    """Runs until its gate is opened; a duplicate is skipped, as by default."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@app.task(**BY_LABEL, lock_ttl=0.6)
def hold_beyond_ttl(self, label):
    """As ``hold``, with a ttl that is much shorter than the test."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@app.task(**BY_LABEL, on_conflict="fail")
def run_or_fail(self, label):
    with _recorded(self, label):
        return label


@app.task(**BY_LABEL, on_conflict="requeue")
def run_later(self, label, number=0):
    with _recorded(self, label):
        time.sleep(0.05)
    return number


@app.task(**BY_LABEL, on_conflict="requeue", wait_timeout=0.5)
def run_soon(self, label):
    with _recorded(self, label):
        return label


def fail_if_urgent(conflict: Conflict) -> str:
    """A conflict policy that goes by an argument of the call."""
    _, is_urgent = current_task.request.args
    return "fail" if is_urgent else "skip"


@app.task(**BY_LABEL, on_conflict=fail_if_urgent)
def run_or_fail_if_urgent(self, label, is_urgent):
    with _recorded(self, label):
        return label


@app.task(base=SingletonTask, bind=True)
def run(self, label):
    """One run per label, with nothing said about its lock."""
    with _recorded(self, label):
        return label


@app.task(**BY_LABEL, on_conflict="skip", throws=(KeyError,))
def end(self, label, how):
    """Ends in the way that ``how`` names."""
    with _recorded(self, label):
        return ENDINGS[how](self, label)


def _return(task: Any, label: str) -> str:
    return label


def _raise(task: Any, label: str) -> None:
    raise KeyError(label)


def _retry(task: Any, label: str) -> str:
    if task.request.retries == 0:
        raise task.retry(countdown=0)
    return label


def _ignore(task: Any, label: str) -> None:
    raise Ignore


def _reject(task: Any, label: str) -> None:
    raise Reject("not wanted", requeue=False)


def _replace(task: Any, label: str) -> None:
    raise task.replace(end.si(label, "return"))


def _exit(task: Any, label: str) -> None:
    raise SystemExit(3)


def _exceed_soft_time_limit(task: Any, label: str) -> None:
    _wait_at_gate(label)


def _catch_soft_time_limit(task: Any, label: str) -> str:
    try:
        _wait_at_gate(label)
    except SoftTimeLimitExceeded:
        return "caught"
    return "not reached"


#: How a body can end, as far as the task itself decides it.
ENDINGS = {
    "return": _return,
    "raise": _raise,
    "retry": _retry,
    "ignore": _ignore,
    "reject": _reject,
    "replace": _replace,
    "exit": _exit,
    "exceed soft time limit": _exceed_soft_time_limit,
    "catch soft time limit": _catch_soft_time_limit,
}


@app.task
def collect(results):
    """The body of a chord; takes no lock."""
    return results


@app.task(bind=True)
def note_error(self, request, error, traceback, label):
    """An errback; takes no lock."""
    with history().recorded(Run(self.name, request.id, label, os.getpid(), 0, 0, time.monotonic())):
        pass


@app.task(name="pytest_celery.vendors.worker.tasks.ping")
def ping():
    """What pytest-celery asks a worker, without all of pytest in the worker."""
    return "pong"


def history() -> History:
    """The history that the bodies of this process write to."""
    return History(_client(os.getpid()))


def open_gate(*labels: str) -> None:
    """Let the bodies that hold these labels go on, and those that come later run through."""
    for label in labels:
        _client(os.getpid()).set(_gate(label), "open", ex=KEPT_FOR)


def _wait_at_gate(label: str) -> None:
    deadline = time.monotonic() + LONGEST_HOLD
    while time.monotonic() < deadline and not _client(os.getpid()).exists(_gate(label)):
        time.sleep(0.02)


def _gate(label: str) -> str:
    return f"worker_app:gate:{label}"


def _recorded(task: Any, label: str) -> AbstractContextManager[None]:
    start, request = time.monotonic(), task.request
    fencing_token = task.lease.fencing_token
    return history().recorded(
        Run(task.name, request.id, label, os.getpid(), request.retries, fencing_token, start)
    )


@lru_cache
def _client(pid: int) -> redis.Redis:
    # By process: a forked child must not share its parent's connections.
    return redis.Redis.from_url(app.conf.history_url, decode_responses=True)
