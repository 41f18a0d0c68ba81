"""R4 where the store fails a run: what can be put back is, and whoever lost learns of it."""

from __future__ import annotations

import signal

import pytest

from celery_singleton_lock import DuplicateTaskError, LeaseLostError
from servers import redis_or_skip
from timeline import overlaps
from waiting import wait_until
from worker_app import (
    LOCK_KEYS,
    hold,
    hold_at_other_gate,
    hold_beyond_ttl,
    open_gate,
    stop_when_lost,
)

POOLS = ["prefork", "threads", "solo", "gevent", "eventlet"]


@pytest.fixture
def own_store():
    """A Redis for locks that this test may end."""
    with redis_or_skip() as server:
        yield server


@pytest.mark.parametrize("worker", POOLS, indirect=True)
def test_a_body_that_lost_its_lease_is_stopped_if_the_task_says_so(
    worker, lock_server, history, label, held_locks
):
    # Given a body that has its lease, and waits
    result = stop_when_lost.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)

    # When somebody deletes its lock
    with lock_server.client() as client:
        client.delete(*client.scan_iter(LOCK_KEYS))

    # Then it ends as an error, long before it would have ended by itself
    with pytest.raises(LeaseLostError):
        result.get(timeout=10)
    history.wait_for_ends(label)
    assert result.state == "FAILURE"
    # And the slot that it ran in is as good as new
    open_gate(label)
    assert stop_when_lost.apply_async((label,), queue=worker.worker_queue).get(timeout=10) == label


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_lock_that_the_store_has_lost_is_put_back_under_its_body(
    start_worker, own_store, history, label, pool
):
    worker = start_worker(pool=pool, singleton_store_url=own_store.url())
    first = hold_beyond_ttl.apply_async((label,), queue=worker.worker_queue)
    (body,) = history.wait_for_starts(label)

    own_store.restart()  # empty
    worker.wait_for_log("was put back")

    second = hold_beyond_ttl.apply_async((label,), queue=worker.worker_queue)
    with pytest.raises(DuplicateTaskError) as caught:
        second.get(timeout=10)
    assert caught.value.holder.task_id == first.id
    assert caught.value.holder.fencing_token == body.fencing_token
    open_gate(label)
    assert first.get(timeout=10) == label
    with own_store.client() as client:
        wait_until(lambda: not client.keys(LOCK_KEYS), "the lock is gone")
    assert "lost its lease" not in worker.logs()
    # The next one's number is higher although the store had lost its counter.
    assert hold_beyond_ttl.apply_async((label,), queue=worker.worker_queue).get(timeout=10)
    tokens = [run.fencing_token for run in history.runs(label)]
    assert tokens == sorted(set(tokens))
    assert overlaps(history.runs(label)) == 0


def test_a_lock_that_somebody_else_has_by_then_is_not_taken_from_them(
    start_worker, own_store, history, label
):
    # Given a store that comes back empty, and a run that takes the lock before the first one's
    # renewal sees it, which is due after 4 s
    worker = start_worker(singleton_store_url=own_store.url(), singleton_lock_ttl=12.0)
    hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    own_store.restart()
    second = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label, count=2)

    worker.wait_for_log("lost its lease")

    with own_store.client() as client:
        (key,) = client.keys(LOCK_KEYS)
        assert client.hget(key, "task_id") == second.id
    open_gate(label)
    history.wait_for_ends(label, count=2)


def test_a_store_that_is_away_for_less_than_half_a_ttl_costs_no_lease(
    start_worker, own_store, history, label
):
    worker = start_worker(singleton_store_url=own_store.url(), singleton_lock_ttl=12.0)
    result = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)

    # The first renewal is due after 4 s; the store is away then, for a command's 2 s at least.
    own_store.process.send_signal(signal.SIGSTOP)
    worker.wait_for_log("Leases cannot be renewed")
    own_store.process.send_signal(signal.SIGCONT)
    worker.wait_for_log("leases are renewed")

    with own_store.client() as client:
        assert client.keys(LOCK_KEYS)
    open_gate(label)
    assert result.get(timeout=10) == label
    assert "lost its lease" not in worker.logs()


def test_a_run_that_lost_its_lock_leaves_the_next_holder_alone(
    worker, lock_server, history, label, new_label
):
    # Given a run whose lock the store has lost, and another one that has taken it since
    gate = new_label()
    first = hold_at_other_gate.apply_async((label, gate), queue=worker.worker_queue)
    history.wait_for_starts(label)
    with lock_server.client() as client:
        client.delete(*client.scan_iter(LOCK_KEYS))
    second = hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label, count=2)

    # When the first one ends
    open_gate(gate)
    assert first.get(timeout=10) == label
    wait_until(lambda: f"[{first.id}] lost its lease" in worker.logs(), "the loss is logged")

    # Then the lock is still the second one's
    third = hold.apply_async((label,), queue=worker.worker_queue)
    with pytest.raises(DuplicateTaskError) as caught:
        third.get(timeout=10)
    assert caught.value.holder.task_id == second.id
