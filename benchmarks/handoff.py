"""One lock from hand to hand: many processes stand in line, each holds it for a moment.

Beside ours: the floor, a token in a list that each pops and pushes back, with nothing that
compares, expires or grows; and redis-py's lock, which asks again and again.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import redis

from celery_singleton_lock.lease import Lease
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claimant, Place
from redis_server import RedisServer

KEY = "singleton:{7}:1:report:42"
TTL = 60.0
#: Seconds between two who come.
APART = 0.001
#: Seconds in which nothing happens: before the first one comes, after the last one came.
SETTLED = 0.02
#: What the connections of the processes are called, by their number.
NAMED = "turn-"
#: Seconds until a process that waits for the others gives up.
LONGEST = 60.0

#: How to acquire and how to release.
Verbs = tuple[Callable[[], object], Callable[[], object]]

_start: Barrier


class Turn(NamedTuple):
    """When the ``number``-th process had the lock and gave it back, by ``time.monotonic()``."""

    number: int
    began: float
    ended: float


class Round(NamedTuple):
    """What one round came to.

    Attributes:
        times_ideal: Its seconds, divided by those in which somebody had to hold the lock.
        overtakes: How many had the lock while one still waited whom the server had heard before.
        round_trips: Per hand-off, as the server counts them: from asking in vain to giving back.
        commands: Per hand-off, those inside scripts included.
    """

    times_ideal: float
    overtakes: int
    round_trips: float
    commands: float


@contextmanager
def lease(url: str) -> Iterator[Verbs]:
    """As a run under ``on_conflict="wait"`` does it."""
    with closing(store_from_url(url, "benchmark")) as store:
        ours = Lease(store, KEY, TTL, Claimant("", "here", os.getpid()))

        def acquire() -> None:
            answer = ours.acquire(Place())
            while not answer.is_acquired:
                answer = ours.wait(TTL)

        store.holder(KEY)  # connects
        yield acquire, ours.release


@contextmanager
def token(url: str) -> Iterator[Verbs]:
    """The floor: a blocking pop."""
    with redis.Redis.from_url(url, socket_timeout=None) as client:
        if client.set("token:exists", 1, nx=True):
            client.lpush("token", 1)
        yield lambda: client.blpop("token"), lambda: client.lpush("token", 1)


@contextmanager
def redis_py(url: str) -> Iterator[Verbs]:
    """redis-py's lock, as it comes."""
    with redis.Redis.from_url(url) as client:
        lock = client.lock("lock", timeout=TTL)
        client.exists("lock")
        yield lock.acquire, lock.release


CONTENDERS = {"Lease.wait()": lease, "a token, BLPOP": token, "redis-py's Lock": redis_py}


def join(start: Barrier) -> None:
    """Initialise a process: all of them begin and end a round together."""
    global _start
    _start = start


def take_a_turn(contender: str, url: str, number: int, hold: float) -> Turn:
    """Come as the ``number``-th, wait for the lock and hold it for so long."""
    with CONTENDERS[contender](f"{url}?client_name={NAMED}{number}") as (acquire, release):
        _start.wait(LONGEST)
        time.sleep(SETTLED + number * APART)
        acquire()
        began = time.monotonic()
        time.sleep(hold)
        ended = time.monotonic()
        release()
        _start.wait(LONGEST)  # whoever goes is heard by the server, which counts
    return Turn(number, began, ended)


class Handoff:
    """Processes that are there for all rounds.

    Args:
        processes: How many stand in line.
        hold: Seconds that each holds the lock.
    """

    def __init__(self, processes: int, hold: float) -> None:
        self._processes = processes
        self._hold = hold
        context = multiprocessing.get_context("spawn")
        self._start = context.Barrier(processes + 1)
        self._pool = ProcessPoolExecutor(processes, context, join, (self._start,))

    def round(self, contender: str) -> Round:
        """All stand in line while we hold the lock, and then have it one after the other."""
        with RedisServer() as server, server.client() as client, ExitStack() as stack:
            url = server.url()
            with CONTENDERS[contender](url) as (acquire, release):
                acquire()
                jobs = [
                    self._pool.submit(take_a_turn, contender, url, number, self._hold)
                    for number in range(self._processes)
                ]
                self._await_all()
                monitor = stack.enter_context(server.client().monitor())
                before = client.info("all")
                self._start.wait(LONGEST)
                time.sleep(2 * SETTLED + self._processes * APART)
                released = time.monotonic()
                release()
                self._await_all()
                after = client.info("all")
                arrivals = _arrivals(client, monitor)
                self._start.wait(LONGEST)
            turns = sorted((job.result() for job in jobs), key=lambda turn: turn.began)
        seconds = turns[-1].ended - released
        return Round(
            times_ideal=seconds / (self._processes * self._hold),
            overtakes=overtakes([arrivals.index(turn.number) for turn in turns]),
            # The second INFO is one of ours.
            round_trips=(_reads(after) - _reads(before) - 1) / self._processes,
            commands=(_calls(after) - _calls(before)) / self._processes,
        )

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()

    def _await_all(self) -> None:
        while self._start.n_waiting < self._processes:
            time.sleep(0.01)


def overtakes(arrivals: Sequence[int]) -> int:
    """How many of these had their turn before one who had arrived earlier.

    Args:
        arrivals: Who was the how manieth to arrive, in the order of the turns.
    """
    count, first_to_wait = 0, len(arrivals)
    for arrival in reversed(arrivals):
        count += arrival > first_to_wait
        first_to_wait = min(first_to_wait, arrival)
    return count


def _arrivals(client: redis.Redis, monitor: Any) -> list[int]:
    """The processes' numbers, in the order in which the server heard them.

    Read when the round is over: the server has written it all down by then.
    """
    names = {each["addr"]: each["name"] for each in client.client_list()}
    client.echo("over")
    heard: list[int] = []
    while (command := monitor.next_command())["command"] != "ECHO over":
        name = names.get(f"{command['client_address']}:{command['client_port']}", "")
        if name.startswith(NAMED) and int(name.removeprefix(NAMED)) not in heard:
            heard.append(int(name.removeprefix(NAMED)))
    return heard


def medians(processes: int, hold: float, rounds: int) -> dict[str, Round]:
    """By contender, the medians over interleaved rounds; of the overtakes the most."""
    handoff = Handoff(processes, hold)
    try:
        played = [{name: handoff.round(name) for name in CONTENDERS} for _ in range(rounds)]
    finally:
        handoff.close()
    return {name: _median([each[name] for each in played]) for name in CONTENDERS}


def _median(rounds: Sequence[Round]) -> Round:
    middle = Round(*(statistics.median(figures) for figures in zip(*rounds, strict=True)))
    return middle._replace(overtakes=max(each.overtakes for each in rounds))


def _reads(info: dict[str, Any]) -> int:
    return int(info["total_reads_processed"])


def _calls(info: dict[str, Any]) -> int:
    return sum(
        row["calls"]
        for name, row in info.items()
        if name.startswith("cmdstat_") and name != "cmdstat_info"
    )
