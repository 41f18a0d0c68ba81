"""What becomes of a run that meets a held lock, and what its callers and monitors see (R6)."""

from __future__ import annotations

from contextlib import suppress

import pytest
from celery import states
from celery.exceptions import TaskRevokedError

from celery_singleton_lock import DuplicateTaskError, LockHeldError
from timeline import overlaps
from waiting import wait_until
from worker_app import (
    app,
    hold,
    note_error,
    open_gate,
    run_later,
    run_or_fail,
    run_or_fail_if_urgent,
    run_soon,
)


@pytest.fixture
def holder(worker, history, label):
    """The result of a run that holds the lock of ``label`` until its gate is opened."""
    result = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    return result


def wait_for_requeue(worker, result):
    wait_until(
        lambda: f"[{result.id}] goes back to the queue" in worker.logs(), "the run was put back"
    )


@pytest.fixture(params=["json", "pickle"])
def sender_and_worker(request, new_app, start_worker):
    """An app and a worker that agree on how results are written."""
    own = {"result_serializer": request.param, "result_accept_content": [request.param]}
    return new_app(**own), start_worker(pool="threads", **own)


def test_the_caller_of_a_skipped_run_is_told_who_holds_the_lock(sender_and_worker, history, label):
    sender, worker = sender_and_worker
    holder = sender.send_task(hold.name, (label,), queue=worker.worker_queue)
    history.wait_for_starts(label)

    skipped = sender.send_task(hold.name, (label,), queue=worker.worker_queue)
    with pytest.raises(DuplicateTaskError) as caught:
        skipped.get(timeout=10)

    assert skipped.state == states.REVOKED
    assert isinstance(caught.value, LockHeldError)
    assert isinstance(caught.value, TaskRevokedError)
    assert caught.value.holder.task_id == holder.id
    assert caught.value.holder.worker == worker.hostname()
    assert holder.id in str(caught.value)


def test_monitors_see_a_skipped_run_as_revoked(worker, holder, label):
    revoked = {}
    handlers = {"task-revoked": lambda event: revoked.update({event["uuid"]: event})}
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers=handlers)
        with receiver.consumer_context(wakeup=False) as (connection, _, _):
            with suppress(TimeoutError):
                connection.drain_events(timeout=0.1)  # the first one subscribes
            skipped = hold.apply_async((label,), queue=worker.worker_queue)
            while skipped.id not in revoked:
                connection.drain_events(timeout=10)

    event = revoked[skipped.id]
    assert (event["terminated"], event["expired"]) == (False, False)


def test_a_run_that_fails_on_conflict_says_so_and_its_errback_runs(
    worker, history, holder, label, new_label
):
    noted = new_label()

    failed = run_or_fail.apply_async(
        (label,), queue=worker.worker_queue, link_error=note_error.s(noted)
    )
    with pytest.raises(LockHeldError) as caught:
        failed.get(timeout=10)

    assert failed.state == states.FAILURE
    assert not isinstance(caught.value, DuplicateTaskError)
    assert caught.value.holder.task_id == holder.id
    (errback,) = history.wait_for_ends(noted)
    assert errback.task_id == failed.id


def test_every_requeued_run_runs_once_with_its_own_id_and_all_its_retries(
    worker, history, holder, label
):
    # Given ten contenders that all met the lock
    contenders = [
        run_later.apply_async((label, number), queue=worker.worker_queue) for number in range(10)
    ]
    for each in contenders:
        wait_for_requeue(worker, each)

    # When the lock becomes free
    open_gate(label)

    # Then each runs once
    assert [each.get(timeout=40) for each in contenders] == list(range(10))
    runs = history.wait_for_ends(label, count=11)
    assert sorted(each.task_id for each in runs[1:]) == sorted(each.id for each in contenders)
    assert overlaps(runs) == 0
    assert {each.retries for each in runs} == {0}


def test_a_requeued_run_fails_when_its_wait_timeout_is_over(worker, history, holder, label):
    waiting = run_soon.apply_async((label,), queue=worker.worker_queue)

    with pytest.raises(LockHeldError) as caught:
        waiting.get(timeout=10)

    assert waiting.state == states.FAILURE
    assert caught.value.holder.task_id == holder.id
    assert "wait_timeout" in str(caught.value)
    assert [each.task_id for each in history.runs(label)] == [holder.id]


def test_a_run_that_expires_while_it_waits_ends_as_revoked(worker, history, holder, label):
    waiting = run_later.apply_async((label,), queue=worker.worker_queue, expires=1)
    wait_for_requeue(worker, waiting)

    with pytest.raises(TaskRevokedError, match="expired") as caught:
        waiting.get(timeout=10)

    assert waiting.state == states.REVOKED
    assert not isinstance(caught.value, LockHeldError)
    assert [each.task_id for each in history.runs(label)] == [holder.id]


def test_a_callable_decides_for_each_call(worker, history, holder, label):
    urgent = run_or_fail_if_urgent.apply_async((label, True), queue=worker.worker_queue)
    patient = run_or_fail_if_urgent.apply_async((label, False), queue=worker.worker_queue)

    with pytest.raises(LockHeldError):
        urgent.get(timeout=10)
    with pytest.raises(DuplicateTaskError):
        patient.get(timeout=10)
    assert (urgent.state, patient.state) == (states.FAILURE, states.REVOKED)
    assert [each.task_id for each in history.runs(label)] == [holder.id]
