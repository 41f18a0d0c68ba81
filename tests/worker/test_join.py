"""A duplicate that joins the run of the same call ends with the outcome of that one."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter

import pytest
from celery import chain, chord, states

from waiting import wait_until
from worker_app import (
    collect,
    note_error,
    open_gate,
    run,
    share,
    share_after_retry,
    share_in_context,
    share_late,
    share_with_short_ttl,
)

#: What a worker logs of a run that has joined another one.
JOINED = "waits in the queue for the outcome of the same call"


@pytest.fixture
def log(worker, new_log):
    return new_log(worker)


@pytest.fixture
def hold(worker, history, label):
    """Starts a run that holds the lock of ``label`` until its gate is opened."""

    def hold(task=share, *args, **options):
        result = task.apply_async((label, *args), queue=worker.worker_queue, **options)
        history.wait_for_starts(label)
        return result

    return hold


@pytest.fixture
def join(worker, log, label):
    """Sends a duplicate, and waits until it has met the lock."""

    def join(task=share, *args, did=JOINED, **options):
        result = task.apply_async((label, *args), queue=worker.worker_queue, **options)
        wait_until(lambda: f"[{result.id}] {did}" in log(), "it has met the lock")
        return result

    return join


def bodies(history, label):
    return Counter(run.task_id for run in history.runs(label))


@pytest.mark.parametrize("worker", ["prefork", "threads", "gevent", "eventlet"], indirect=True)
def test_a_duplicate_ends_with_the_value_of_the_holder(worker, history, label, log, hold, join):
    holder = hold()
    duplicate = join()
    assert not duplicate.ready()

    open_gate(label)

    assert (duplicate.get(timeout=20), holder.get()) == ("shared", "shared")
    assert duplicate.state == states.SUCCESS
    assert bodies(history, label) == {holder.id: 1}
    assert f"[{duplicate.id}] ends with the outcome of {holder.id}" in log()


def test_a_duplicate_ends_with_the_error_of_the_holder_and_all_are_told(
    worker, history, label, new_label, hold, join
):
    noted, after = new_label(), new_label()
    link = run.si(after).set(queue=worker.worker_queue)
    link.freeze()
    holder = hold(share, "error")
    duplicate = join(share, "error", link=[link], link_error=[note_error.s(noted)])

    open_gate(label)

    with pytest.raises(KeyError, match=label):
        duplicate.get(timeout=20)
    assert (duplicate.state, link.type.AsyncResult(link.id).state) == (states.FAILURE,) * 2
    history.wait_for_ends(noted)
    assert bodies(history, label) == {holder.id: 1}
    assert len(history.runs(noted)) == 1


def test_what_follows_a_duplicate_goes_on_with_the_value(
    worker, history, log, label, new_label, hold
):
    queue, linked = worker.worker_queue, new_label()
    holder = hold()
    link, last = run.si(linked).set(queue=queue), collect.s().set(queue=queue)
    result = chain(share.si(label).set(queue=queue, link=[link]), last).apply_async()
    wait_until(lambda: joined(log) == {result.parent.id}, "it has joined")

    open_gate(label)

    assert result.get(timeout=20) == "shared"
    history.wait_for_ends(linked)
    assert bodies(history, label) == {holder.id: 1}
    assert len(history.runs(linked)) == 1


def test_who_has_joined_fills_no_slot(worker, new_label, label, hold, join):
    hold()
    for _ in range(5):  # more than there are slots
        join()

    other = run.apply_async((new_label(),), queue=worker.worker_queue)

    assert other.get(timeout=20)


def test_a_lock_that_is_held_by_hand_has_no_outcome(history, label, join):
    with share.lock(label):
        duplicate = join(did="goes back to the queue")
        open_gate(label)

    assert duplicate.get(timeout=20) == "shared"
    assert bodies(history, label) == {duplicate.id: 1}


def test_another_call_under_the_same_lock_has_another_outcome(history, label, hold, join):
    holder = hold(share, "one")
    other = join(share, "other", did="goes back to the queue")

    open_gate(label)

    assert (holder.get(timeout=20), other.get(timeout=20)) == ("one", "other")
    assert bodies(history, label) == {holder.id: 1, other.id: 1}


def kill(history, label):
    """Kill the holder, and let later bodies run through."""
    (holder, *_) = history.runs(label)
    os.kill(holder.pid, signal.SIGKILL)
    open_gate(label)


def test_who_has_joined_a_run_that_is_killed_runs(history, label, hold, join):
    holder = hold()
    duplicate = join()

    kill(history, label)

    assert duplicate.get(timeout=20) == "shared"
    assert holder.get(propagate=False, timeout=20) is not None
    assert holder.state == states.FAILURE
    assert bodies(history, label) == {holder.id: 1, duplicate.id: 1}


def test_who_has_joined_a_run_whose_result_is_ignored_runs(history, log, label, hold, join):
    holder = hold(share, ignore_result=True)
    duplicate = join()

    open_gate(label)

    assert duplicate.get(timeout=20) == "shared"
    assert f"{holder.id}, although the lock is free" in log()
    assert bodies(history, label) == {holder.id: 1, duplicate.id: 1}


def test_who_has_joined_a_run_that_is_revoked_runs(history, label, hold, join):
    holder = hold()
    duplicate = join()

    holder.revoke(terminate=True)

    wait_until(lambda: holder.state == states.REVOKED, "it is revoked")
    open_gate(label)
    assert duplicate.get(timeout=20) == "shared"
    assert bodies(history, label) == {holder.id: 1, duplicate.id: 1}


def test_who_has_joined_a_run_that_keeps_its_lock_for_its_retry_waits_for_that(
    history, label, hold, join
):
    holder = hold(share_after_retry)
    duplicate = join(share_after_retry)

    assert duplicate.get(timeout=20) == "shared"
    assert bodies(history, label) == {holder.id: 2}


def test_a_body_that_is_called_through_a_base_of_its_own_is_so_once(history, label, hold, join):
    holder = hold(share_in_context)
    duplicate = join(share_in_context)

    open_gate(label)

    assert duplicate.get(timeout=20) == ["in context", label]
    assert bodies(history, label) == {holder.id: 1}


def joined(log):
    """The ids of those who have."""
    return set(re.findall(rf"\[([^]]+)\] {JOINED}", log()))


def header(task, label, queue):
    return [task.si(label).set(queue=queue) for _ in range(100)]


@pytest.mark.parametrize("is_killed", [False, True], ids=["all is well", "the holder is killed"])
def test_a_chord_of_a_hundred_equal_calls(worker, history, log, label, is_killed):
    queue = worker.worker_queue
    result = chord(header(share_late, label, queue))(collect.s().set(queue=queue))
    (holder,) = history.wait_for_starts(label)
    wait_until(lambda: len(joined(log)) == 99, "the others have joined")

    if is_killed:
        os.kill(holder.pid, signal.SIGKILL)
        history.wait_for_starts(label, count=2)
    open_gate(label)

    assert result.get(timeout=30) == ["shared"] * 100
    assert len(history.runs(label)) == 1 + is_killed


def test_of_a_hundred_that_have_joined_a_run_which_leaves_no_outcome_one_runs(
    worker, history, log, label, hold
):
    queue = worker.worker_queue
    hold()
    result = chord(header(share, label, queue))(collect.s().set(queue=queue))
    wait_until(lambda: len(joined(log)) == 100, "they have joined")

    kill(history, label)

    assert result.get(timeout=30) == ["shared"] * 100
    assert len(history.runs(label)) == 2


def test_so_it_is_where_nobody_sees_how_the_holder_ends(worker, start_worker, history, log, label):
    doomed = start_worker(concurrency=1)
    share_with_short_ttl.apply_async((label,), queue=doomed.worker_queue)
    history.wait_for_starts(label)
    queue = worker.worker_queue
    result = chord(header(share_with_short_ttl, label, queue))(collect.s().set(queue=queue))
    wait_until(lambda: len(joined(log)) == 100, "they have joined")

    doomed.container.kill()
    open_gate(label)

    assert result.get(timeout=30) == ["shared"] * 100
    assert len(history.runs(label)) == 2
    assert "although the lock is free" in log()
