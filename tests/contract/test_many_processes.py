"""R1 where it is hardest: many processes, one key, no pause."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import contender

KEY = "singleton:{7}:1:report:42"
PROCESSES, ROUNDS = 4, 10_000


def test_four_processes_take_one_lock_ten_thousand_times_each_and_never_overlap(redis_server):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, contender.join, (start,)) as processes:
        jobs = [
            processes.submit(contender.acquire_and_release, redis_server.url(), KEY, ROUNDS)
            for _ in range(PROCESSES)
        ]
        held = sorted(entry for job in jobs for entry in job.result())

    assert len(held) == PROCESSES * ROUNDS
    assert [pair for pair in pairwise(held) if pair[1][0] < pair[0][1]] == [], "overlaps"
    tokens = [token for _, _, token in held]
    assert tokens == sorted(set(tokens)), "fencing tokens grow in the order of the holders"
