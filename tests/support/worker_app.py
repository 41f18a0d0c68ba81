"""The app of the worker tests: run by the workers, imported by the tests that send to them.

A worker finds its settings in the environment; the tests' fixture ``app`` gives the same ones
to this process. Nothing is connected at import.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import SoftTimeLimitExceeded
from celery.worker.request import Request

from celery_singleton_lock import Conflict, SingletonTask
from history import KEPT_FOR, History, Run

#: Settings for a worker, as JSON. Celery's own, this package's, and ``history_url``.
ENVIRONMENT_VARIABLE = "WORKER_APP_SETTINGS"
#: What all lock keys of these tasks match, and nobody else's.
LOCK_KEYS = "singleton:{*}:1:worker_app.*"
#: Seconds after which a body goes on although nobody opened its gate: its test has failed.
LONGEST_HOLD = 25.0

logging.getLogger("celery_singleton_lock").setLevel(logging.DEBUG)  # Celery's own: INFO

app = Celery("worker_app", backend="cache+memory://")  # join asks for one, also at collection
app.conf.update(json.loads(os.environ.get(ENVIRONMENT_VARIABLE, "{}")))

#: Not shared, which would bind these tasks to every app that other tests make.
task = partial(app.task, shared=False)
locked_task = partial(task, base=SingletonTask, bind=True)
#: Such tasks have one lock per label among them.
by_label = partial(locked_task, lock_name="worker_app.label", lock_args="label")


@by_label
def hold(self, label):
    """Runs until its gate is opened; a duplicate is skipped, as by default."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@by_label(lock_ttl=300.0)
def hold_for_long(self, label):
    """As ``hold``; its lease is not renewed before a test is over."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@by_label(lock_ttl=1.0)
def hold_beyond_ttl(self, label):
    """As ``hold``, with a ttl that is much shorter than the test."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@by_label(lock_ttl=1.0, on_lease_lost="abort")
def stop_when_lost(self, label):
    """As ``hold_beyond_ttl``, and is stopped when it has lost its lease."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


class CarelessRequest(Request):
    """Somebody's own request class, whose methods do not call the next ones."""

    def on_accepted(self, pid, time_accepted):
        print(f"{self.id} was accepted")

    def on_failure(self, exc_info, *args, **kwargs):
        print(f"{self.id} failed")


@by_label(Request=CarelessRequest)
def hold_with_own_request(self, label):
    """As ``hold``, with a request class of its own."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@by_label(lock_ttl=3.0)
def hold_with_short_ttl(self, label):
    """As ``hold``, with a ttl that a test can wait for, and a busy machine can keep."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


def _ignore_the_end(label: str) -> None:
    while True:
        try:
            return _wait_at_gate(label)
        except (SystemExit, SoftTimeLimitExceeded):
            continue


@by_label
def ignore_the_end(self, label):
    """As ``hold``, and swallows what would end it."""
    with _recorded(self, label):
        _ignore_the_end(label)
    return label


@by_label(lock_ttl=1.0)
def ignore_the_end_beyond_ttl(self, label):
    """As ``ignore_the_end``, with a ttl that is much shorter than the test."""
    with _recorded(self, label):
        _ignore_the_end(label)
    return label


@by_label(lock_ttl=1.5)
def stop_the_gil(self, label):
    """Spends twice its ttl in one C call that holds the GIL; returns how long."""
    with _recorded(self, label):
        began = time.monotonic()
        letters = 20
        while time.monotonic() - began < 2 * self.lock_ttl:  # twice as long each time
            began = time.monotonic()
            re.match(r"(a+)+$", "a" * letters + "b")
            letters += 1
        return time.monotonic() - began


class SlowToLeave(SingletonTask):
    """Stores its result, and has the lock for a while after that."""

    def after_return(self, *args):
        time.sleep(0.3)
        super().after_return(*args)


@by_label(base=SlowToLeave)
def leave_slowly(self, label):
    with _recorded(self, label):
        return label


@by_label(base=SlowToLeave, on_conflict="requeue")
def leave_slowly_in_turn(self, label):
    with _recorded(self, label):
        return label


@by_label(lock_at_least_for=3, on_conflict="skip")
def run_rarely(self, label, is_to_retry=False):
    with _recorded(self, label):
        if is_to_retry and self.request.retries == 0:
            raise self.retry(countdown=0)
        return label


@by_label(lock_on_retry="hold", max_retries=1, default_retry_delay=1)
def retry_in_place(self, label):
    """Fails for good after one retry."""
    with _recorded(self, label):
        raise self.retry()


@by_label(on_conflict="skip", max_retries=1)
def retry_once(self, label, countdown):
    with _recorded(self, label):
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)
        return label


@by_label(lock_on_retry="hold", lock_ttl=1.0, max_retries=1)
def retry_in_place_soon(self, label):
    """Succeeds in its retry, which nobody waits for longer than 1 s after its countdown of 1 s."""
    with _recorded(self, label):
        if self.request.retries == 0:
            raise self.retry(None, None, None, True, None, 1)
        return label


@by_label(on_conflict="requeue")
def describe(self, label):
    """What the message said of the run."""
    names = (
        "id root_id parent_id group group_index chord chain callbacks errbacks expires timelimit "
        "retries reply_to correlation_id origin shadow stamps stamped_headers ignore_result "
        "replaced_task_nesting argsrepr kwargsrepr"
    )
    told = {name: getattr(self.request, name, None) for name in names.split()}
    delivery = {name: self.request.delivery_info.get(name) for name in ("priority", "routing_key")}
    return {**told, **delivery, "mine": (self.request.headers or {}).get("mine")}


@by_label(on_conflict="skip")
def hand_on(self, label, is_last=False):
    """Gives its lock back early, publishes its successor, and runs until its gate is opened."""
    with _recorded(self, label):
        if not is_last:
            self.lease.release()
            self.apply_async((label, True), queue=self.request.delivery_info["routing_key"])
            _wait_at_gate(label)
    return label


@by_label(on_conflict="wait")
def run_in_line(self, label, seconds=0.0):
    with _recorded(self, label):
        time.sleep(seconds)
        return label


@by_label(on_conflict="wait")
def hold_in_line(self, label):
    """As ``hold``; others stand in line for it."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@by_label(on_conflict="wait", lock_ttl=3.0)
def hold_in_line_with_short_ttl(self, label):
    """As ``hold_in_line``, with a ttl that a test can wait for, and a busy machine can keep."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


@by_label(on_conflict="wait", lock_on_retry="hold")
def hold_and_retry_in_place(self, label):
    """As ``hold_in_line``, and then keeps its lock for its one retry."""
    with _recorded(self, label):
        _wait_at_gate(label)
        if self.request.retries == 0:
            raise self.retry(countdown=1)
    return label


@by_label(on_conflict="wait", wait_timeout=1)
def wait_a_second(self, label):
    with _recorded(self, label):
        return label


@by_label(on_conflict="wait", acks_late=True)
def run_in_line_late(self, label):
    with _recorded(self, label):
        return label


@by_label(acks_late=True, reject_on_worker_lost=True)
def die_once(self, label):
    """Kills its own process, but not when it runs again."""
    is_first = not history().runs(label)
    with _recorded(self, label):
        if is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        return label


@by_label(acks_late=True, reject_on_worker_lost=True, on_conflict="requeue", lock_ttl=2.5)
def have_effect(self, label, seconds):
    """Has its effect at the very end: a run that is killed has none."""
    with _recorded(self, label):
        time.sleep(seconds)
        history().note_effect(label, self.request.id)


@by_label(on_conflict="skip")
def hold_at_other_gate(self, label, gate):
    """As ``hold``, with a gate that is not its label's."""
    with _recorded(self, label):
        _wait_at_gate(gate)
    return label


@by_label(on_conflict="skip")
def stream_skip(self, label, seconds):
    """Runs for so long, unless its gate is opened, as those of its stream do."""
    with _recorded(self, label):
        _wait_at_gate(label, seconds)


@by_label(on_conflict="requeue")
def stream_requeue(self, label, seconds):
    """As ``stream_skip``, and goes back to the queue."""
    with _recorded(self, label):
        _wait_at_gate(label, seconds)


@by_label(on_conflict="wait")
def stream_wait(self, label, seconds):
    """As ``stream_skip``, and stands in line."""
    with _recorded(self, label):
        _wait_at_gate(label, seconds)


@by_label(on_conflict="fail")
def run_or_fail(self, label):
    with _recorded(self, label):
        return label


@by_label(on_conflict="requeue")
def run_later(self, label, number=0):
    with _recorded(self, label):
        time.sleep(0.05)
    return number


@by_label(on_conflict="requeue")
def count(self, label):
    """Reads the label's counter and writes it one higher; returns what it wrote."""
    with _recorded(self, label):
        counted = int(_client(os.getpid()).get(_counter(label)) or 0)
        time.sleep(0.005)
        _client(os.getpid()).set(_counter(label), counted + 1, ex=KEPT_FOR)
    return counted + 1


@by_label(on_conflict="requeue")
def tell_message(self, label):
    """Returns what its message says: a header of the test's, priority, expiry, put back or not."""
    with _recorded(self, label):
        request = self.request
        return [request.headers, request.delivery_info["priority"], request.expires]


@by_label(on_conflict="requeue", wait_timeout=0.5)
def run_soon(self, label):
    with _recorded(self, label):
        return label


@by_label(on_conflict="join")
def share(self, label, answer="shared"):
    """Runs until its gate is opened, and returns what it is told to, or raises."""
    with _recorded(self, label):
        _wait_at_gate(label)
    if answer == "error":
        raise KeyError(label)
    return answer


@by_label(on_conflict="join", lock_ttl=3.0)
def share_with_short_ttl(self, label):
    """As ``share``, with a ttl that a test can wait for, and a busy machine can keep."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return "shared"


@by_label(on_conflict="join", acks_late=True, reject_on_worker_lost=True)
def share_late(self, label, answer="shared"):
    """As ``share``, and runs again if its process dies."""
    with _recorded(self, label):
        _wait_at_gate(label)
    return answer


@by_label(on_conflict="join", lock_ttl=1.0, lock_on_retry="hold")
def share_after_retry(self, label):
    """Succeeds in its retry, and keeps its lock for it."""
    with _recorded(self, label):
        if self.request.retries == 0:
            raise self.retry(countdown=1)
    return "shared"


class InContext(Task):
    """As Flask's documentation has it: bodies run in a context."""

    def __call__(self, *args, **kwargs):
        return ["in context", self.run(*args, **kwargs)]


@by_label(base=type("Both", (SingletonTask, InContext), {}), on_conflict="join")
def share_in_context(self, label):
    with _recorded(self, label):
        _wait_at_gate(label)
    return label


def fail_if_urgent(conflict: Conflict) -> str:
    """A conflict policy that goes by an argument of the call."""
    _, is_urgent = conflict.args
    return "fail" if is_urgent else "skip"


@by_label(on_conflict=fail_if_urgent)
def run_or_fail_if_urgent(self, label, is_urgent):
    with _recorded(self, label):
        return label


@locked_task
def run(self, label):
    """One run per label, with nothing said about its lock."""
    with _recorded(self, label):
        return label


@locked_task(acks_late=True)
def run_late(self, label):
    """As ``run``, acknowledged late."""
    with _recorded(self, label):
        return label


@task
def collect(results):
    """The body of a chord; takes no lock."""
    return results


@task
def note_error(request, error, traceback, label):
    """An errback; takes no lock. Not bound: Celery gives a bound one the task id only."""
    now = time.monotonic()
    with history().recorded(Run(note_error.name, request.id, label, os.getpid(), 0, 0, now)):
        pass


if ENVIRONMENT_VARIABLE in os.environ:  # in a worker: the tests have pytest-celery's own

    @task(name="pytest_celery.vendors.worker.tasks.ping")
    def ping():
        """What pytest-celery asks a worker, without all of pytest in it."""
        return "pong"


def history() -> History:
    """The history that the bodies of this process write to."""
    return History(_client(os.getpid()))


def open_gate(*labels: str) -> None:
    """Let the bodies that hold these labels go on, and those that come later run through."""
    for label in labels:
        _client(os.getpid()).set(_gate(label), "open", ex=KEPT_FOR)


def _wait_at_gate(label: str, seconds: float = LONGEST_HOLD) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _client(os.getpid()).exists(_gate(label)):
        time.sleep(0.02)


def _gate(label: str) -> str:
    return f"worker_app:gate:{label}"


def _counter(label: str) -> str:
    return f"worker_app:counter:{label}"


def _recorded(self: Any, label: str) -> AbstractContextManager[None]:
    start, request = time.monotonic(), self.request
    fencing_token = self.lease.fencing_token
    return history().recorded(
        Run(self.name, request.id, label, os.getpid(), request.retries, fencing_token, start)
    )


@lru_cache
def _client(pid: int) -> redis.Redis:
    # By process: a forked child must not share its parent's connections.
    return redis.Redis.from_url(app.conf.history_url, decode_responses=True)
