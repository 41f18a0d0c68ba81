"""R3 and R4 where the child cannot help itself: killed, stopped, or deaf in a C call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from celery.exceptions import TimeLimitExceeded, WorkerLostError

from celery_singleton_lock.request import is_gone
from timeline import overlaps
from waiting import wait_until
from worker_app import (
    die_once,
    hold,
    hold_beyond_ttl,
    hold_with_own_request,
    ignore_the_end,
    ignore_the_end_beyond_ttl,
    open_gate,
    stop_the_gil,
)

#: Celery notices a dead child within 5 s; the ttl of these locks is 30 s.
NOTICED = 8.0


def executes(pid: int) -> bool:
    """Whether the process can still do anything; one that waits to be reaped cannot."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def own_worker(start_worker):
    """A prefork worker that no other test needs."""
    return start_worker(pool="prefork", concurrency=2)


@pytest.fixture
def lock_is_gone(held_locks):
    def lock_is_gone(within=NOTICED):
        wait_until(lambda: not held_locks(), "the lock is gone", timeout=within)

    return lock_is_gone


@pytest.mark.parametrize("platform", ["Linux", "macOS before Python 3.13"])
def test_a_child_is_gone_when_it_has_ended_and_not_before(monkeypatch, platform):
    if platform != "Linux":
        monkeypatch.delattr(os, "waitid")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not is_gone(child.pid)
        child.kill()
        if platform == "Linux":
            wait_until(lambda: is_gone(child.pid), "the child is gone")
            assert child.poll() == -signal.SIGKILL, "it was left to be reaped"
    assert is_gone(child.pid)


def test_the_lock_of_a_killed_child_is_free_as_soon_as_celery_notices(
    own_worker, history, label, lock_is_gone, held_locks
):
    result = hold.apply_async((label,), queue=own_worker.worker_queue)
    (run,) = history.wait_for_starts(label)
    assert held_locks()

    os.kill(run.pid, signal.SIGKILL)

    lock_is_gone()
    with pytest.raises(WorkerLostError):
        result.get(timeout=10)


def test_a_killed_childs_message_that_goes_back_to_the_queue_runs_again(
    own_worker, history, label, lock_is_gone
):
    # Its first run kills its own process; late acknowledgement, reject_on_worker_lost.
    result = die_once.apply_async((label,), queue=own_worker.worker_queue)

    assert result.get(timeout=20) == label
    assert len(history.runs(label)) == 2
    lock_is_gone()


def test_a_task_may_have_a_request_class_of_its_own(
    own_worker, history, label, lock_is_gone, held_locks
):
    result = hold_with_own_request.apply_async((label,), queue=own_worker.worker_queue)
    (run,) = history.wait_for_starts(label)
    own_worker.wait_for_log(f"{result.id} was accepted")

    os.kill(run.pid, signal.SIGKILL)

    own_worker.wait_for_log(f"{result.id} failed")
    lock_is_gone()


def test_the_lock_of_a_run_that_is_revoked_and_killed_is_free(
    own_worker, history, label, lock_is_gone
):
    result = hold.apply_async((label,), queue=own_worker.worker_queue)
    history.wait_for_starts(label)

    result.revoke(terminate=True, signal="SIGKILL")

    lock_is_gone()


def test_a_body_that_ignores_its_hard_time_limit_has_the_lock_until_its_process_is_gone(
    own_worker, history, label, lock_is_gone
):
    result = ignore_the_end.apply_async((label,), queue=own_worker.worker_queue, time_limit=0.5)
    (run,) = history.wait_for_starts(label)

    lock_is_gone(within=5.0)

    assert not executes(run.pid)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=10)


def test_a_body_that_survives_its_revocation_keeps_its_lock(
    own_worker, history, label, held_locks, lock_is_gone
):
    # Given a body with a ttl of 1 s that swallows the SystemExit of SIGTERM
    ignore_the_end_beyond_ttl.apply_async((label,), queue=own_worker.worker_queue)
    (run,) = history.wait_for_starts(label)
    control = ignore_the_end_beyond_ttl.app.control
    control.revoke(run.task_id, terminate=True, signal="SIGTERM")
    wait_until(
        lambda: (
            control.inspect([own_worker.hostname()], timeout=0.5).active()
            in ({own_worker.hostname(): []}, None)
        ),
        "Celery takes the run for ended",
    )

    assert executes(run.pid)
    assert held_locks()

    open_gate(label)
    history.wait_for_ends(label)
    lock_is_gone()


def test_a_c_call_that_holds_the_gil_for_longer_than_the_ttl_keeps_the_lock(
    own_worker, history, label, lock_is_gone
):
    # When the body holds the GIL for twice its ttl, and duplicates come
    first = stop_the_gil.apply_async((label,), queue=own_worker.worker_queue)
    history.wait_for_starts(label)
    others = []
    while not first.ready():
        others.append(stop_the_gil.apply_async((label,), queue=own_worker.worker_queue))
        wait_until(others[-1].ready, "the duplicate is refused, or runs")

    assert first.get(timeout=10) > 2 * stop_the_gil.lock_ttl
    runs = history.runs(label)
    assert overlaps(runs) == 0
    assert runs[0].end - runs[0].start > 2 * stop_the_gil.lock_ttl
    # Only one that came after the first had ended may have run.
    assert [each.state for each in others[:-1]] == ["REVOKED"] * (len(others) - 1)
    lock_is_gone()
    assert "lost its lease" not in own_worker.logs()


def test_a_stopped_child_keeps_its_lock(own_worker, history, label, held_locks, lock_is_gone):
    hold_beyond_ttl.apply_async((label,), queue=own_worker.worker_queue)
    (run,) = history.wait_for_starts(label)

    os.kill(run.pid, signal.SIGSTOP)
    try:
        duplicate = hold_beyond_ttl.apply_async((label,), queue=own_worker.worker_queue)
        wait_until(duplicate.ready, "the duplicate is refused")
        for _ in range(4):  # each ping takes half a ttl
            own_worker.app.control.ping([own_worker.hostname()], timeout=0.5)
        assert held_locks()
    finally:
        os.kill(run.pid, signal.SIGCONT)

    assert duplicate.state == "REVOKED"
    open_gate(label)
    history.wait_for_ends(label)
    lock_is_gone()
