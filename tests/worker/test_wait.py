"""``wait``: runs stand in line in their slots, and the release wakes the first of them."""

from __future__ import annotations

import os
import signal
import time

import pytest
from celery import states
from celery.exceptions import SoftTimeLimitExceeded

from celery_singleton_lock import LockHeldError
from timeline import overlaps
from waiting import wait_until
from worker_app import (
    hand_on,
    hold,
    hold_and_retry_in_place,
    hold_in_line,
    hold_in_line_with_short_ttl,
    open_gate,
    retry_in_place,
    run_in_line,
    run_in_line_late,
    wait_a_second,
)

POOLS = ["prefork", "threads", "gevent", "eventlet"]


def stands_in_line(log, result):
    wait_until(lambda: f"[{result.id}] stands in line" in log(), "it stands in line")


@pytest.mark.parametrize("pool", POOLS)
def test_waiting_runs_have_their_turn_in_the_order_in_which_they_came(
    shared_worker, new_log, history, label, pool
):
    worker = shared_worker(pool)
    log = new_log(worker)
    first = hold_in_line.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    waiting = []
    for _ in range(3):
        waiting.append(run_in_line.apply_async((label,), queue=worker.worker_queue))
        stands_in_line(log, waiting[-1])

    open_gate(label)

    assert [each.get(timeout=20) for each in waiting] == [label] * 3
    runs = history.wait_for_ends(label, count=4)
    assert [each.task_id for each in runs] == [each.id for each in (first, *waiting)]
    assert overlaps(runs) == 0


def test_a_release_wakes_a_waiting_run_of_another_worker_at_once(
    shared_worker, new_log, history, label
):
    here, there = shared_worker("prefork", 1), shared_worker("prefork", 2)
    log = new_log(there)
    hold_in_line.apply_async((label,), queue=here.worker_queue)
    history.wait_for_starts(label)
    waiting = run_in_line.apply_async((label,), queue=there.worker_queue)
    stands_in_line(log, waiting)

    open_gate(label)

    waiting.get(timeout=20)
    first, second = history.wait_for_ends(label, count=2)
    assert second.start > first.end


def test_a_run_that_has_waited_for_its_wait_timeout_fails(worker, history, label):
    holder = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)

    waiting = wait_a_second.apply_async((label,), queue=worker.worker_queue)
    with pytest.raises(LockHeldError, match="wait_timeout is over") as caught:
        waiting.get(timeout=20)

    assert waiting.state == states.FAILURE
    assert caught.value.holder.task_id == holder.id
    assert [each.task_id for each in history.runs(label)] == [holder.id]


def test_a_soft_time_limit_ends_the_waiting(worker, history, label):
    holder = hold_in_line.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)

    waiting = run_in_line.apply_async((label,), queue=worker.worker_queue, soft_time_limit=1)

    with pytest.raises(SoftTimeLimitExceeded):
        waiting.get(timeout=20)
    assert [each.task_id for each in history.runs(label)] == [holder.id]


def test_a_run_that_has_given_its_lock_back_may_publish_its_own_successor(worker, history, label):
    first = hand_on.apply_async((label,), queue=worker.worker_queue)

    both = history.wait_for_starts(label, count=2)  # although the first goes on
    open_gate(label)

    assert first.get(timeout=20) == label
    assert both[1].fencing_token > both[0].fencing_token


def test_a_waiting_run_that_is_revoked_leaves_the_line(start_worker, new_log, history, label, app):
    worker = start_worker(concurrency=3)
    log = new_log(worker)
    hold_in_line.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    revoked = run_in_line.apply_async((label,), queue=worker.worker_queue)
    stands_in_line(log, revoked)
    next_one = run_in_line.apply_async((label,), queue=worker.worker_queue)
    stands_in_line(log, next_one)

    app.control.revoke(revoked.id, terminate=True, destination=[worker.hostname()])
    wait_until(lambda: revoked.state == states.REVOKED, "it is revoked")
    open_gate(label)

    assert next_one.get(timeout=20) == label
    runs = history.wait_for_ends(label, count=2)
    assert revoked.id not in {each.task_id for each in runs}


@pytest.mark.parametrize("task", [run_in_line, run_in_line_late])
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_warm_shutdown_sends_waiting_runs_back_to_their_queue(
    start_worker, shared_worker, new_log, history, label, pool, task
):
    # Given a run that waits for a lock of another worker
    elsewhere = shared_worker("prefork")
    holder = hold_in_line.apply_async((label,), queue=elsewhere.worker_queue)
    history.wait_for_starts(label)
    worker = start_worker(pool=pool, concurrency=1)
    log = new_log(worker)
    waiting = task.apply_async((label,), queue=worker.worker_queue)
    stands_in_line(log, waiting)

    # When its worker is told to stop, it does so although the lock is held
    os.kill(worker.container.process.pid, signal.SIGTERM)
    wait_until(lambda: worker.container.status == "exited", "the worker has stopped")

    # Then the next worker runs it
    assert [each.task_id for each in history.runs(label)] == [holder.id]
    open_gate(label)
    worker.container.start()
    assert waiting.get(timeout=20) == label
    runs = history.wait_for_ends(label, count=2)
    assert [each.task_id for each in runs] == [holder.id, waiting.id]


def test_nobody_waits_in_a_slot_for_a_lock_that_is_kept_for_a_retry(
    start_worker, new_log, history, label
):
    # Given one slot, in which a run waits for a lock whose holder has no slot
    worker = start_worker(concurrency=1)
    log = new_log(worker)
    retrying = retry_in_place.apply_async((label,), queue=worker.worker_queue)
    wait_until(lambda: retrying.state == states.RETRY, "the lock is kept for its retry")

    waiting = run_in_line.apply_async((label,), queue=worker.worker_queue)
    wait_until(lambda: f"[{waiting.id}] goes back to the queue" in log(), "it goes back")

    wait_until(retrying.ready, "the retry has had its slot")
    assert waiting.get(timeout=20) == label
    runs = history.wait_for_ends(label, count=3)
    assert [each.task_id for each in runs] == [retrying.id, retrying.id, waiting.id]


def test_a_lock_that_turns_to_be_kept_for_a_retry_sends_those_who_wait_back(
    start_worker, new_log, history, label
):
    # Given two slots, one for a run that will retry, and one for a run that waits for it
    worker = start_worker(concurrency=2)
    log = new_log(worker)
    retrying = hold_and_retry_in_place.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    waiting = [run_in_line.apply_async((label,), queue=worker.worker_queue) for _ in range(2)]
    stands_in_line(log, waiting[0])

    open_gate(label)

    for each in waiting:
        wait_until(lambda each=each: f"[{each.id}] goes back to the queue" in log(), "it goes back")
    assert [each.get(timeout=20) for each in waiting] == [label] * 2
    assert retrying.get(timeout=20) == label
    runs = history.wait_for_ends(label, count=4)
    assert {each.task_id for each in runs[:2]} == {retrying.id}


def test_when_the_heads_of_the_line_are_killed_with_their_worker_the_next_has_it_soon(
    start_worker, shared_worker, new_log, history, label
):
    # Given a line of eight on one worker, and a ninth on another
    elsewhere, doomed = shared_worker("prefork"), start_worker(pool="threads", concurrency=8)
    logs = [(doomed, new_log(doomed))] * 8 + [(elsewhere, new_log(elsewhere))]
    hold_in_line.apply_async((label,), queue=elsewhere.worker_queue)
    history.wait_for_starts(label)
    for worker, log in logs:
        last = run_in_line.apply_async((label,), queue=worker.worker_queue)
        stands_in_line(log, last)

    # When that worker is killed, and then the lock is released
    doomed.container.kill()
    open_gate(label)

    # Then the ninth has it within 3 s
    last.get(timeout=20)
    first, second = history.wait_for_ends(label, count=2)
    assert second.task_id == last.id
    assert second.start - first.end < 3.0


def test_a_waiting_run_gets_the_lock_of_a_killed_worker_when_its_ttl_is_over(
    start_worker, shared_worker, new_log, history, label
):
    here, doomed = shared_worker("prefork"), start_worker(pool="threads")
    log = new_log(here)
    hold_in_line_with_short_ttl.apply_async((label,), queue=doomed.worker_queue)
    history.wait_for_starts(label)
    waiting = run_in_line.apply_async((label,), queue=here.worker_queue)
    stands_in_line(log, waiting)

    doomed.container.kill()
    killed_at = time.monotonic()
    waiting.get(timeout=20)

    assert time.monotonic() - killed_at < hold_in_line_with_short_ttl.lock_ttl + 2.0
