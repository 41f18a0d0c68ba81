"""A stream of newcomers that keeps a lock busy, and one run among them that is put back."""

from __future__ import annotations

import json
import threading
import time

import pytest

from waiting import wait_until
from worker_app import open_gate, run_later, stream_requeue, stream_skip, stream_wait

#: Newcomers a second, and seconds that each holds the lock: twice as much as it can bear.
RATE, HOLD = 7, 0.3
#: Newcomers that have had the lock before the other run comes.
BEFORE = 4
PLACES = "singleton:*:line:1:worker_app.label:*:*[0-9]"


@pytest.fixture
def stream(worker_with_many_slots, held_locks, label):
    """Begins a stream of newcomers that ends with the test; tells who of them was sent when."""
    queue, is_over, threads = worker_with_many_slots.worker_queue, threading.Event(), []

    def flow(task, sent):
        while not is_over.wait(1 / RATE):
            now = time.monotonic()
            newcomer = task.apply_async((label, HOLD), queue=queue, ignore_result=True)
            sent[newcomer.id] = now

    def stream(task):
        sent = {}
        threads.append(threading.Thread(target=flow, args=(task, sent)))
        threads[-1].start()
        return sent

    yield stream
    is_over.set()
    for thread in threads:
        thread.join()
    open_gate(label)
    wait_until(lambda: not held_locks(), "all newcomers have run, and their line is over")


@pytest.fixture
def worker_with_many_slots(start_worker):
    """All newcomers can wait at once: what is in no slot nobody can let in."""
    return start_worker(pool="threads", concurrency=60)


@pytest.mark.parametrize("task", [stream_skip, stream_requeue, stream_wait])
def test_at_most_three_newcomers_pass_a_run_that_was_put_back(
    worker_with_many_slots, lock_server, stream, history, label, task
):
    # Given a stream that keeps the lock busy
    sent = stream(task)
    history.wait_for_starts(label, count=BEFORE)

    # When another run comes, which goes back to its queue
    waiting = run_later.apply_async((label,), queue=worker_with_many_slots.worker_queue)
    with lock_server.client() as client:
        stands_since = wait_until(lambda: came_at(client, waiting.id), "it has its place")

    # Then it has its turn soon
    waiting.get(timeout=20)
    runs = history.runs(label)
    (own,) = (each for each in runs if each.task_id == waiting.id)
    before = [each.task_id for each in runs if each.start < own.start]
    passed = [each for each in before if sent[each] > stands_since]
    assert len(passed) <= 3


def came_at(client, task_id):
    """When the run took its place, which is its number, by ``time.monotonic()``."""
    for key in client.scan_iter(PLACES):
        place = client.get(key)
        if place and json.loads(place)["task_id"] == task_id:
            seconds_ago = time.time() - int(key.rpartition(":")[2]) / 1_000_000
            return time.monotonic() - seconds_ago
    return None
