"""Many processes that stand in line for one lock, as runs under ``wait`` do.

A program of its own: it forks, which the process of the tests had better not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from celery_singleton_lock.lease import Lease
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claimant, Place

TTL = 60.0
#: Seconds until what still waits is stuck, and killed.
LONGEST = 60


class Turn(NamedTuple):
    """What one process saw.

    Attributes:
        number: Its place in line, which the server gives out in the order of arrival.
        waits: How often it went to sleep for its turn: once, and once more each time that it had
            to show that it is alive.
        began: When it had the lock, by a clock that all processes share.
        ended: When it gave it back.
        fencing_token: Of its lease.
    """

    number: int
    waits: int
    began: float
    ended: float
    fencing_token: int


@contextmanager
def queuers(url: str, key: str, count: int, hold: float) -> Iterator[subprocess.Popen[str]]:
    """So many processes, connected, that wait to be told to come."""
    process = subprocess.Popen(
        [sys.executable, __file__, url, key, str(count), str(hold)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.communicate()


def let_come(process: subprocess.Popen[str]) -> None:
    """Let all come at once, for a lock that somebody else has."""
    process.stdin.write("come\n")
    process.stdin.flush()


def turns(process: subprocess.Popen[str]) -> list[Turn]:
    """Their turns, in order, when the last one is over."""
    return [Turn(*turn) for turn in json.loads(process.stdout.readline())]


def _take_a_turn(url: str, key: str, hold: float, start: Any, taken: Any) -> None:
    signal.alarm(LONGEST)
    with closing(store_from_url(url, "the test")) as store:
        lease = Lease(store, key, TTL, Claimant(str(os.getpid()), "here", os.getpid()))
        store.holder(key)  # connects
        start.wait()
        answer, number, waits = lease.acquire(Place()), 0, 0
        while not answer.is_acquired:
            number, waits = answer.place.number, waits + 1
            answer = lease.wait(TTL)
        began = time.monotonic()
        time.sleep(hold)
        ended = time.monotonic()
        assert lease.release()
    taken.put(Turn(number, waits, began, ended, lease.fencing_token))


def _main(url: str, key: str, count: int, hold: float) -> None:
    signal.alarm(LONGEST)
    context = multiprocessing.get_context("fork")
    start, taken = context.Barrier(count + 1), context.SimpleQueue()
    job = (url, key, hold, start, taken)
    processes = [context.Process(target=_take_a_turn, args=job, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    while start.n_waiting < count:
        time.sleep(0.01)
    print("ready", flush=True)
    if sys.stdin.readline():  # else nobody wants it any more
        start.wait()
        print(json.dumps(sorted((taken.get() for _ in processes), key=_began)), flush=True)


def _began(turn: Turn) -> float:
    return turn.began


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
