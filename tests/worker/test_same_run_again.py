"""R5: a run never loses to itself, nor to one whose body is over."""

from __future__ import annotations

from uuid import uuid4

import pytest
from celery import chain
from celery.app.trace import build_tracer
from celery.exceptions import MaxRetriesExceededError

from celery_singleton_lock import LockHeldError, lock_acquired
from celery_singleton_lock.publishing import HEADER
from timeline import overlaps
from waiting import wait_until
from worker_app import (
    hold,
    leave_slowly,
    open_gate,
    retry_in_place,
    run,
    run_or_fail,
    run_rarely,
)


def deliver(task, *args, **request):
    """Run ``task`` as a worker does that gets such a message."""
    request.setdefault("id", str(uuid4()))
    trace = build_tracer(task.name, task, app=task.app)
    return trace(request["id"], args, {}, request)


def test_the_next_call_after_get_runs_although_the_lock_is_not_given_back_yet(
    worker, history, label
):
    for _ in range(3):
        assert leave_slowly.apply_async((label,), queue=worker.worker_queue).get(timeout=10)

    assert len(history.runs(label)) == 3
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
    backend = run.backend
    state = {True: "SUCCESS", False: "STARTED"}
    monkeypatch.setattr(backend, "get_state", lambda task_id: state[bool(held_locks())])
    events = []

    def note(event, **_):
        events.append(event)

    lock_acquired.connect(note)

    deliver(run, label, delivery_info={"redelivered": True})

    lock_acquired.disconnect(note)
    assert history.runs(label) == []
    assert held_locks() == []
    assert events == []


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


def test_a_kept_lock_does_not_bar_the_runs_own_retry(worker, history, label, held_locks):
    result = run_rarely.apply_async((label, True), queue=worker.worker_queue)

    assert result.get(timeout=10) == label
    assert held_locks(), "it is still kept, from the first attempt on"
    first, second = history.runs(label)
    assert first.task_id == second.task_id
    assert first.fencing_token < second.fencing_token


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
