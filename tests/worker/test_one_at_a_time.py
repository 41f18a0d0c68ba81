"""R1 and R4 on every pool: one body per lock key, for as long as it lives."""

from __future__ import annotations

import time

import pytest
from celery import states

from celery_singleton_lock import DuplicateTaskError
from timeline import most_at_once, overlaps
from waiting import wait_until
from worker_app import hold, hold_beyond_ttl, open_gate, run

POOLS = ["prefork", "threads", "solo", "gevent", "eventlet"]


@pytest.fixture
def second_worker(worker, shared_worker, request):
    """A worker with a free slot while ``worker`` runs one body: for solo, another one."""
    return shared_worker("solo", number=2) if "solo" in worker.hostname() else worker


@pytest.mark.parametrize("worker", POOLS, indirect=True)
def test_duplicates_of_a_task_that_outlives_its_ttl_three_times_are_all_skipped(
    worker, second_worker, history, label
):
    # Given a body that is renewed, since it runs longer than its ttl
    first = hold_beyond_ttl.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)

    # When duplicates arrive all the time
    duplicates = []
    for _ in range(20):
        duplicates.append(hold_beyond_ttl.apply_async((label,), queue=second_worker.worker_queue))
        time.sleep(3 * hold_beyond_ttl.lock_ttl / 20)
    wait_until(
        lambda: all(each.ready() for each in duplicates) or len(history.runs(label)) > 1,
        "every duplicate is skipped, or one runs",
    )
    open_gate(label)
    history.wait_for_ends(label)

    # Then one body ran, and each duplicate was told whose
    (body,) = history.runs(label)
    assert body.task_id == first.id
    assert body.end - body.start > 3 * hold_beyond_ttl.lock_ttl
    assert first.get(timeout=10) == label
    assert {each.state for each in duplicates} == {states.REVOKED}
    assert {type(each.result) for each in duplicates} == {DuplicateTaskError}
    assert {each.result.holder.task_id for each in duplicates} == {first.id}
    assert {each.result.holder.pid for each in duplicates} == {body.pid}
    assert {each.result.holder.worker for each in duplicates} == {worker.hostname()}


@pytest.mark.parametrize("worker", POOLS, indirect=True)
def test_runs_that_come_one_after_the_other_all_run_and_their_fencing_tokens_grow(
    worker, history, label
):
    for _ in range(5):
        assert run.apply_async((label,), queue=worker.worker_queue).get(timeout=10) == label
        history.wait_for_ends(label)

    runs = history.runs(label)
    tokens = [each.fencing_token for each in runs]
    assert len(runs) == 5
    assert overlaps(runs) == 0
    assert tokens == sorted(set(tokens))
    assert tokens[0] > 0


@pytest.mark.parametrize("worker", POOLS, indirect=True)
def test_runs_with_different_keys_run_side_by_side(worker, second_worker, history, new_label):
    slots = [worker, second_worker] if second_worker is not worker else [worker] * 4
    labels = [new_label() for _ in slots]

    results = [
        hold.apply_async((label,), queue=slot.worker_queue)
        for label, slot in zip(labels, slots, strict=True)
    ]
    # All start although none can end
    history.wait_for_starts(*labels, count=len(slots))
    open_gate(*labels)

    assert [each.get(timeout=10) for each in results] == labels
    assert most_at_once(history.runs(*labels)) == len(slots)
