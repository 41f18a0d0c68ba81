"""However many updates come during a run, one run follows it, with the newest."""

from __future__ import annotations

import os
import signal
import time

import pytest
from celery import chain, states

from celery_singleton_lock import DuplicateTaskError
from celery_singleton_lock.publishing import GENERATION
from rerun_tasks import effect_of, update, update_too, update_with_retry
from waiting import wait_until
from worker_app import collect, open_gate


@pytest.fixture
def publish(worker, label):
    def publish(number, task=update, **options):
        return task.apply_async((label, number), queue=worker.worker_queue, **options)

    return publish


@pytest.fixture
def first(publish, history, label):
    """An update whose run goes on until its gate is opened."""
    result = publish(1)
    history.wait_for_starts(label)
    return result


def wait_for_put_back(worker, result):
    wait_until(lambda: f"[{result.id}] goes back to the queue" in worker.logs(), "it went back")


@pytest.mark.parametrize("worker", ["prefork", "threads", "gevent"], indirect=True)
def test_one_run_follows_with_the_newest_arguments(worker, publish, first, history, label):
    others = [publish(number) for number in range(2, 22)]
    *older, newest = others
    wait_for_put_back(worker, newest)

    open_gate(label)

    assert first.get(timeout=20) == 1
    assert newest.get(timeout=20) == 21
    assert effect_of(label) == 21
    runs = history.runs(label)
    assert [runs[0].task_id, runs[-1].task_id] == [first.id, newest.id]
    assert len(runs) == 2
    for each in older:
        with pytest.raises(DuplicateTaskError):
            each.get(timeout=20)
    assert {each.state for each in older} == {states.REVOKED}


def test_what_comes_late_although_it_is_older_does_not_undo_the_newer(publish, history, label):
    open_gate(label)
    newer = publish(2)
    assert newer.get(timeout=20) == 2
    an_hour_ago = (time.time_ns() - 3600 * 10**9) // 1000

    late = publish(1, headers={GENERATION: an_hour_ago})

    with pytest.raises(DuplicateTaskError, match="had since by the newer") as caught:
        late.get(timeout=20)
    assert caught.value.holder.task_id == newer.id
    assert effect_of(label) == 2
    assert len(history.runs(label)) == 1


def test_a_run_that_nobody_published_through_the_task_is_as_new_as_its_arrival(
    app, worker, first, history, label
):
    send = {"queue": worker.worker_queue}
    older = app.send_task(update.name, (label, 2), **send)
    wait_for_put_back(worker, older)
    newer = app.send_task(update.name, (label, 3), **send)
    wait_for_put_back(worker, newer)
    open_gate(label)

    assert newer.get(timeout=20) == 3
    with pytest.raises(DuplicateTaskError):
        older.get(timeout=20)
    assert effect_of(label) == 3


def test_a_retry_does_not_undo_what_is_newer(worker, publish, history, label):
    retried = publish(1, update_with_retry)
    history.wait_for_starts(label)
    newer = publish(2, update_with_retry)
    wait_for_put_back(worker, newer)
    open_gate(label)

    assert newer.get(timeout=20) == 2
    with pytest.raises(DuplicateTaskError):
        retried.get(timeout=20)
    assert effect_of(label) == 2


def test_a_retry_that_nothing_newer_came_before_is_run(publish, label):
    open_gate(label)

    assert publish(1, update_with_retry).get(timeout=20) == 1


def test_tasks_that_share_a_lock_follow_each_for_itself(worker, publish, first, history, label):
    theirs = [publish(number, update_too) for number in (2, 3)]
    wait_for_put_back(worker, theirs[1])
    ours = publish(4)
    wait_for_put_back(worker, ours)

    open_gate(label)

    assert theirs[1].get(timeout=20) == 3
    assert ours.get(timeout=20) == 4
    with pytest.raises(DuplicateTaskError):
        theirs[0].get(timeout=20)
    assert [each.task_id for each in history.runs(label)] == [first.id, theirs[1].id, ours.id]


def test_steps_after_one_that_was_left_out_are_told(worker, publish, first, label):
    queue = worker.worker_queue
    left_out = chain(update.si(label, 2).set(queue=queue), collect.si([]).set(queue=queue))()
    newer = publish(3)

    with pytest.raises(DuplicateTaskError):
        left_out.get(timeout=20)
    open_gate(label)
    assert newer.get(timeout=20) == 3


@pytest.mark.parametrize("whom", ["the run", "the newest"])
def test_who_is_killed_is_run_again_and_the_newest_is_last(
    worker, publish, first, history, label, whom
):
    newest = publish(2)
    wait_for_put_back(worker, newest)
    (run,) = history.runs(label)
    os.kill(run.pid, signal.SIGKILL)
    if whom == "the newest":
        (_, run) = history.wait_for_starts(label, count=2)
        os.kill(run.pid, signal.SIGKILL)

    open_gate(label)

    assert newest.get(timeout=30) == 2
    wait_until(lambda: first.ready(), "the first is done with")
    assert effect_of(label) == 2


def test_a_revoked_follow_up_keeps_nobody_out(worker, publish, first, held_locks, label):
    follow_up = publish(2)
    wait_for_put_back(worker, follow_up)

    follow_up.revoke()
    open_gate(label)

    first.get(timeout=20)
    wait_until(lambda: not held_locks(), "the lock is free", timeout=8)
