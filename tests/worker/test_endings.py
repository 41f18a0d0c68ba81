"""R3 for the endings that let the process unwind: the lock is free at once, not after its ttl."""

from __future__ import annotations

import pytest

from celery_singleton_lock import DuplicateTaskError
from timeline import overlaps
from waiting import wait_until
from worker_app import LOCK_KEYS, end, hold, hold_at_other_gate, open_gate

#: Far below the ttl of the task's lock, far above the time that a busy machine takes.
AT_ONCE = 5.0


@pytest.fixture
def lock_is_gone(held_locks):
    """Waits until no lock is held, for much less than the ttl."""

    def lock_is_gone():
        assert end.lock_ttl > 2 * AT_ONCE
        wait_until(lambda: not held_locks(), "the lock is gone", timeout=AT_ONCE)

    return lock_is_gone


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("return", {}),
        ("raise", {}),
        ("ignore", {}),
        ("reject", {}),
        ("exceed soft time limit", {"soft_time_limit": 0.5}),
        ("catch soft time limit", {"soft_time_limit": 0.5}),
    ],
)
def test_the_lock_is_free_as_soon_as_the_run_has_ended(
    worker, history, label, lock_is_gone, how, options
):
    end.apply_async((label, how), queue=worker.worker_queue, **options)

    (run,) = history.wait_for_ends(label)
    lock_is_gone()

    assert run.fencing_token > 0


def test_the_lock_is_free_as_soon_as_a_body_has_ended_its_process(
    start_worker, history, label, lock_is_gone
):
    # Its own worker: a pool that has lost a process can take seconds to notice.
    worker = start_worker(concurrency=1)
    end.apply_async((label, "exit"), queue=worker.worker_queue)

    (run,) = history.wait_for_ends(label)
    lock_is_gone()

    assert run.fencing_token > 0


@pytest.mark.parametrize("how", ["retry", "replace"])
def test_a_run_that_sends_itself_again_at_once_is_not_skipped_by_its_own_lock(
    worker, history, label, lock_is_gone, how
):
    result = end.apply_async((label, how), queue=worker.worker_queue)

    assert result.get(timeout=10) == label
    runs = history.wait_for_ends(label, count=2)
    lock_is_gone()
    assert [run.task_id for run in runs] == [result.id, result.id]
    assert [run.retries for run in runs] == ([0, 1] if how == "retry" else [0, 0])
    assert overlaps(runs) == 0


def test_an_eager_run_that_raises_to_its_caller_frees_its_lock(history, label, lock_is_gone):
    with pytest.raises(KeyError):
        end.apply((label, "raise"), throw=True)

    (run,) = history.runs(label)
    assert run.fencing_token > 0
    lock_is_gone()


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
