"""R1 where it is hardest: many processes, one key, no pause."""

from __future__ import annotations

import multiprocessing
import time
from itertools import pairwise

from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claimant

KEY = "singleton:{7}:1:report:42"
PROCESSES, ROUNDS = 4, 10_000


def acquire_and_release(url: str, start, histories) -> None:
    """Take the lock ROUNDS times, and report when it was held and with which fencing token."""
    store = store_from_url(url, "the test")
    claimant = Claimant("", "here", multiprocessing.current_process().pid)
    history = []
    start.wait()
    for number in range(ROUNDS):
        owner_token = f"{claimant.pid}-{number}"
        while True:
            acquisition = store.acquire(KEY, owner_token, 60.0, claimant)
            if acquisition.is_acquired:
                break
        began = time.monotonic_ns()  # one clock for all processes of a machine
        history.append((began, time.monotonic_ns(), acquisition.holder.fencing_token))
        assert store.release(KEY, owner_token)
    histories.put(history)


def test_four_processes_take_one_lock_ten_thousand_times_each_and_never_overlap(redis_server):
    context = multiprocessing.get_context("spawn")
    start, histories = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=acquire_and_release, args=(redis_server.url(), start, histories))
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    held = sorted(entry for _ in processes for entry in histories.get(timeout=300))
    for process in processes:
        process.join(30)

    assert len(held) == PROCESSES * ROUNDS
    overlaps = [pair for pair in pairwise(held) if pair[1][0] < pair[0][1]]
    assert overlaps == []
    tokens = [token for _, _, token in held]
    assert tokens == sorted(set(tokens)), "fencing tokens grow in the order of the holders"
