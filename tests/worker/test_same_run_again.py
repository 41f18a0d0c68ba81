"""R5: a run never loses to itself, nor to one whose body is over."""

from __future__ import annotations

import os
import signal
from uuid import uuid4

import pytest
from celery import chain, chord
from celery.app.trace import build_tracer
from celery.exceptions import MaxRetriesExceededError

from celery_singleton_lock import LockHeldError, lock_acquired, lock_released
from celery_singleton_lock.publishing import HEADER
from ending_tasks import end_rarely
from timeline import overlaps
from waiting import wait_until
from worker_app import (
    hold,
    leave_slowly,
    leave_slowly_in_turn,
    open_gate,
    retry_in_place,
    retry_in_place_soon,
    retry_once,
    run,
    run_later,
    run_or_fail,
    run_rarely,
)


def deliver(task, *args, **request):
    """Run ``task`` as a worker does that gets such a message."""
    request.setdefault("id", str(uuid4()))
    trace = build_tracer(task.name, task, app=task.app)
    return trace(request["id"], args, {}, request)


def kept_for(client, key):
    """Seconds from the first attempt's start until the lock ends, by the store's clock."""
    now, since, left = client.pipeline().time().hget(key, "since_us").pttl(key).execute()
    return now[0] + now[1] / 1e6 + left / 1e3 - int(since) / 1e6


def test_the_next_call_after_get_runs_although_the_lock_is_not_given_back_yet(
    worker, history, label
):
    for _ in range(3):
        assert leave_slowly.apply_async((label,), queue=worker.worker_queue).get(timeout=10)

    assert len(history.runs(label)) == 3
    assert overlaps(history.runs(label)) == 0


def test_a_thousand_calls_that_wait_for_the_one_before_all_run(worker, history, label):
    for _ in range(1000):
        assert run.apply_async((label,), queue=worker.worker_queue).get(timeout=10) == label

    assert len(history.runs(label)) == 1000
    assert overlaps(history.runs(label)) == 0


def test_the_steps_of_a_chain_that_share_a_lock_all_run(worker, history, label):
    steps = [leave_slowly.si(label).set(queue=worker.worker_queue) for _ in range(3)]

    assert chain(*steps).apply_async().get(timeout=10) == label
    assert len(history.runs(label)) == 3
    assert overlaps(history.runs(label)) == 0


def test_so_do_the_steps_of_a_chain_whose_results_are_not_stored(worker, history, label):
    steps = [
        leave_slowly.si(label).set(queue=worker.worker_queue, ignore_result=True) for _ in range(3)
    ]

    chain(*steps).apply_async()

    history.wait_for_ends(label, count=3)
    assert overlaps(history.runs(label)) == 0


def test_the_members_and_the_body_of_a_chord_that_share_a_lock_all_run(worker, history, label):
    members = [leave_slowly_in_turn.si(label).set(queue=worker.worker_queue) for _ in range(3)]
    body = leave_slowly.si(label).set(queue=worker.worker_queue)

    assert chord(members, body).apply_async().get(timeout=20) == label
    assert len(history.runs(label)) == 4
    assert overlaps(history.runs(label)) == 0


@pytest.mark.parametrize("countdown", [0, 1])
def test_a_retry_runs_although_others_take_the_lock_in_between(
    worker, history, label, new_label, countdown
):
    # Given a run that will be retried, and others that have the lock from its end on
    result = retry_once.apply_async((label, countdown), queue=worker.worker_queue)
    history.wait_for_ends(label)
    others = [
        run_later.apply_async((label, number), queue=worker.worker_queue)
        for number in range(5 + 25 * countdown)
    ]

    # Then it waits for its turn as often as it has to, with the one retry that it has
    assert result.get(timeout=60) == label
    assert [other.get(timeout=60) for other in others] == list(range(len(others)))
    runs = history.runs(label)
    assert [each.retries for each in runs if each.task_id == result.id] == [0, 1]
    assert overlaps(runs) == 0


def test_a_redelivered_copy_of_a_run_that_succeeded_does_not_run(app, history, label):
    task_id = str(uuid4())
    run.backend.store_result(task_id, "first", "SUCCESS")

    deliver(run, label, id=task_id, delivery_info={"redelivered": True})

    assert history.runs(label) == []
    assert run.AsyncResult(task_id).get(timeout=10) == "first"


def test_nor_does_one_that_met_the_lock_of_its_first_copy_and_was_put_back(
    worker, app, history, label
):
    # Given a redelivered copy that meets a lock, and goes back to the queue as a new message
    holder = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    task_id = str(uuid4())
    queue = {"exchange": "", "routing_key": worker.worker_queue}
    deliver(run_or_fail, label, id=task_id, delivery_info={**queue, "redelivered": True})

    # When its first copy succeeds meanwhile
    run_or_fail.backend.store_result(task_id, "first", "SUCCESS")
    open_gate(label)

    wait_until(
        lambda: f"[{task_id}] has succeeded already" in worker.logs(), "the copy ends without a run"
    )
    assert [each.task_id for each in history.runs(label)] == [holder.id]


@pytest.mark.parametrize("state", ["PENDING", "FAILURE"])
def test_a_redelivered_copy_of_any_other_run_does(app, history, label, state):
    task_id = str(uuid4())
    if state == "FAILURE":
        run.backend.store_result(task_id, KeyError("first"), state)

    deliver(run, label, id=task_id, delivery_info={"redelivered": True})

    assert len(history.runs(label)) == 1


def test_a_copy_looks_for_that_success_with_the_lock_in_hand(
    app, history, label, held_locks, monkeypatch
):
    # Given a first copy that succeeds while the second one asks for its lock
    state = {True: "SUCCESS", False: "STARTED"}
    monkeypatch.setattr(run.backend, "get_state", lambda task_id: state[bool(held_locks())])
    events = []

    def note(event, **_):
        events.append(event)

    for each in (lock_acquired, lock_released):
        each.connect(note)
    deliver(run, label, delivery_info={"redelivered": True})
    for each in (lock_acquired, lock_released):
        each.disconnect(note)

    assert history.runs(label) == []
    assert held_locks() == []
    assert events == [], "no body had it"


def test_a_run_that_got_its_lock_starts_afresh_when_it_is_retried(app, history, label):
    seen = []

    def note(sender, **_):
        seen.append(sender.request.headers)

    lock_acquired.connect(note)
    try:
        deliver(run, label, headers={HEADER: [1.0, 3, False], "mine": 1}, delivery_info={})
    finally:
        lock_acquired.disconnect(note)

    assert seen == [{"mine": 1}]


def test_a_lock_is_kept_for_as_long_as_the_task_says(worker, history, label, held_locks):
    first = run_rarely.apply_async((label,), queue=worker.worker_queue)
    assert first.get(timeout=10) == label

    with pytest.raises(LockHeldError) as caught:
        run_or_fail.apply_async((label,), queue=worker.worker_queue).get(timeout=10)

    assert caught.value.holder.task_id == first.id
    wait_until(lambda: not held_locks(), "the lock is gone", timeout=8)
    assert run_or_fail.apply_async((label,), queue=worker.worker_queue).get(timeout=10) == label


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("body: return", 1),
        ("body: raise", 1),
        ("body: Ignore", 1),
        ("body: Reject", 1),
        ("body: retry, once", 2),
        ("body: Reject to the queue, once", 2),
        ("before_start: raise", 0),
        ("body: raise; on_failure: raise", 1),
        ("after_return: raise", 1),
    ],
)
def test_a_lock_is_kept_for_that_long_however_its_run_ends(
    worker, lock_server, history, label, held_locks, how, count
):
    end_rarely.apply_async((label, how), queue=worker.worker_queue)
    if count:
        history.wait_for_ends(label, count=count)

    with lock_server.client() as client:
        (key,) = wait_until(held_locks, "the lock is taken")
        wait_until(lambda: client.hget(key, "owner_token") == "", "it is nobody's, and kept")
        kept = kept_for(client, key)
        client.delete(key)

    assert kept == pytest.approx(end_rarely.lock_at_least_for, abs=0.1)


def test_a_kept_lock_does_not_bar_the_runs_own_retry(worker, history, label, held_locks):
    result = run_rarely.apply_async((label, True), queue=worker.worker_queue)

    assert result.get(timeout=10) == label
    assert held_locks(), "it is still kept, from the first attempt on"
    first, second = history.runs(label)
    assert first.task_id == second.task_id
    assert first.fencing_token < second.fencing_token


def test_a_retry_that_comes_too_late_for_its_promise_is_like_anyones(
    start_worker, worker, lock_server, history, label, held_locks
):
    # Given a retry that is promised its lock for its countdown and one ttl, 1 s each, and a worker
    # that does not get round to it
    retrying = start_worker(concurrency=1)
    result = retry_in_place_soon.apply_async((label,), queue=retrying.worker_queue)
    history.wait_for_ends(label)
    os.kill(retrying.container.process.pid, signal.SIGSTOP)
    with lock_server.client() as client:
        (key,) = held_locks()
        wait_until(lambda: client.hget(key, "owner_token") == "", "it is kept")
        assert kept_for(client, key) >= 2.0
    wait_until(lambda: not held_locks(), "the promise is over")

    # When somebody else has the lock by the time that it does
    other = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label, count=2)
    os.kill(retrying.container.process.pid, signal.SIGCONT)
    retrying.wait_for_log("goes back to the queue")
    open_gate(label)

    assert result.get(timeout=20) == label
    runs = history.runs(label)
    assert [each.task_id for each in runs] == [result.id, other.id, result.id]
    assert overlaps(runs) == 0


def test_nobody_gets_in_before_a_retry_that_holds_the_lock(worker, history, label, held_locks):
    result = retry_in_place.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_ends(label)

    with pytest.raises(LockHeldError) as caught:
        run_or_fail.apply_async((label,), queue=worker.worker_queue).get(timeout=10)

    assert caught.value.holder.task_id == result.id
    # When the last retry is used up, the promise is taken back: the ttl would be 30 s.
    with pytest.raises(MaxRetriesExceededError):
        result.get(timeout=10)
    wait_until(lambda: not held_locks(), "the lock is gone", timeout=5)
    assert [each.retries for each in history.runs(label)] == [0, 1]
