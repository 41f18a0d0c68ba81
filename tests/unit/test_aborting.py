"""``on_lease_lost="abort"``: the error comes up in the body that it is for, and nowhere else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread, Timer

import pytest

import waiting
from celery_singleton_lock.aborting import Abort
from celery_singleton_lock.errors import LeaseLostError
from servers import missing
from waiting import DEADLINE


class SoftTimeLimitError(Exception):
    pass


@pytest.fixture
def soft_time_limit():
    """A handler as a child process of the pool has it."""

    def raise_it(number, frame):
        raise SoftTimeLimitError

    before = signal.signal(signal.SIGUSR1, raise_it)
    yield raise_it
    signal.signal(signal.SIGUSR1, before)


def spin():
    """Runs Python bytecode until it is stopped."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        pass


def wait():
    Event().wait(DEADLINE)


def fire_from_elsewhere(abort):
    thread = Thread(target=abort.fire)
    thread.start()
    return thread


def is_stopped(abort, body):
    """Whether ``body`` is, when ``abort`` is fired in another thread."""
    go = Event()
    Thread(target=lambda: go.wait(DEADLINE) and abort.fire()).start()
    try:
        go.set()
        body()
    except LeaseLostError as error:
        return "another run may have the lock" in str(error)
    finally:
        abort.disarm()
    return False


def test_a_body_in_the_main_thread_is_stopped(soft_time_limit):
    assert is_stopped(Abort.here(), spin)

    assert signal.getsignal(signal.SIGUSR1) is soft_time_limit


def test_so_is_one_that_waits(soft_time_limit):
    abort, began = Abort.here(), time.monotonic()
    timer = Timer(0.1, abort.fire)
    timer.start()
    with pytest.raises(LeaseLostError):
        wait()
    abort.disarm()
    timer.join()

    assert time.monotonic() - began < DEADLINE / 2


def test_a_soft_time_limit_is_still_one(soft_time_limit):
    abort = Abort.here()

    with pytest.raises(SoftTimeLimitError):
        signal.raise_signal(signal.SIGUSR1)

    abort.disarm()


@pytest.mark.parametrize("is_main", [True, False])
def test_a_body_that_is_over_is_not_stopped(soft_time_limit, is_main):
    def run():
        abort = Abort.here()
        abort.disarm()
        fire_from_elsewhere(abort).join()
        for _ in range(1000):
            pass
        return "undisturbed"

    with ThreadPoolExecutor(1) as other:
        assert (run() if is_main else other.submit(run).result()) == "undisturbed"


@pytest.mark.parametrize("is_main", [True, False])
def test_a_body_that_ends_while_it_is_stopped_leaves_nothing_behind(soft_time_limit, is_main):
    def run():
        for _ in range(300):
            abort, go = Abort.here(), Event()
            racer = Thread(target=lambda go=go, abort=abort: go.wait() and abort.fire())
            racer.start()
            try:
                go.set()
                abort.disarm()
            except LeaseLostError:  # in the last moment before; as in a body
                abort.disarm()
            racer.join()
            for _ in range(100):
                pass
        return "undisturbed"

    with ThreadPoolExecutor(1) as other:
        assert (run() if is_main else other.submit(run).result()) == "undisturbed"


def test_a_body_that_is_stopped_while_it_ends_is_over_all_the_same(soft_time_limit, monkeypatch):
    abort = Abort.here()
    call_off = abort._call_off

    def interrupted():
        monkeypatch.setattr(abort, "_call_off", call_off)
        raise LeaseLostError

    monkeypatch.setattr(abort, "_call_off", interrupted)
    abort.disarm()

    assert signal.getsignal(signal.SIGUSR1) is soft_time_limit


@pytest.mark.parametrize(("moment", "outcome"), [("", "stopped"), ("over", "undisturbed")])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_a_body_in_a_greenlet_is_stopped_where_it_waits_unless_it_is_over(library, moment, outcome):
    if not find_spec(library):
        missing(f"{library} is not installed")
    program = Path(waiting.__file__).with_name("greenlet_abort.py")

    done = subprocess.run(
        [sys.executable, str(program), library, moment], capture_output=True, text=True, timeout=20
    )

    assert done.stdout == f"{outcome}\n", done.stderr


def test_a_body_in_another_thread_is_stopped_and_only_that_one():
    has_begun, may_end = Event(), Event()

    def other_body():
        abort = Abort.here()
        has_begun.set()
        assert may_end.wait(DEADLINE)
        abort.disarm()
        return "ended"

    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(other_body)
        assert has_begun.wait(DEADLINE)
        assert threads.submit(lambda: is_stopped(Abort.here(), spin)).result()
        may_end.set()
        assert other.result() == "ended"


def test_it_comes_up_once(soft_time_limit):
    abort = Abort.here()

    def twice():
        try:
            abort.fire()
            spin()
        except LeaseLostError:
            abort.fire()
            for _ in range(1000):
                pass
            return "undisturbed"

    assert twice() == "undisturbed"
    abort.disarm()


def test_where_the_signal_would_end_the_process_an_asynchronous_error_does():
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    abort = Abort.here()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL

    assert is_stopped(abort, spin)
