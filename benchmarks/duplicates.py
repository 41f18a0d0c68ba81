"""Many duplicates of one run that holds its lock: what they ask of the lock server.

Also the Celery app of the worker that skips them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import redis
from celery import Celery

from celery_singleton_lock import SingletonTask
from fleet import Fleet
from redis_server import RedisServer

#: Seconds that the holder holds, at most.
LONGEST = 300.0
#: Seconds without a question to the lock server: all duplicates are done.
QUIET = 1.0

app = Celery("benchmarks.duplicates", set_as_current=False)
app.conf.broker_url = os.environ.get("DUPLICATES_URL", "redis://localhost:6379/0")
app.conf.singleton_store_url = os.environ.get("DUPLICATES_LOCK_URL", app.conf.broker_url)
app.conf.task_default_queue = "duplicates"
app.conf.task_ignore_result = True


# The ttl: no renewal is to be counted.
@app.task(base=SingletonTask, shared=False, lock_ttl=4 * LONGEST)
def hold() -> None:
    """Hold the lock until all duplicates are done."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        client.set("held", 1)
        client.blpop(["done"], timeout=LONGEST)


@app.task(base=SingletonTask, shared=False, lock_ttl=4 * LONGEST, lock_phase="lifetime")
def hold_for_life() -> None:
    """As ``hold``; a second one is not even published."""
    hold.run()


def skip_duplicates(count: int) -> tuple[int, float]:
    """Have a worker with four slots skip so many; returns lock round trips and seconds."""
    return _play(lambda *stage: _skipped(*stage, count))


def leave_out_duplicates(count: int) -> tuple[int, float]:
    """Publish a call so many times while it runs; returns lock round trips and seconds.

    Raises:
        RuntimeError: One was published.
    """
    return _play(lambda *stage: _left_out(*stage, count))


def _play(scene: Callable[..., tuple[int, float]]) -> tuple[int, float]:
    with RedisServer() as server, RedisServer() as lock_server:
        os.environ["DUPLICATES_URL"] = app.conf.broker_url = server.url()
        os.environ["DUPLICATES_LOCK_URL"] = app.conf.singleton_store_url = lock_server.url()
        with Fleet(app, "duplicates") as fleet:
            fleet.start_worker("worker", 4, app.conf.task_default_queue)
            fleet.wait_until_ready()
            with server.client() as client, lock_server.client() as locks:
                return scene(fleet, client, locks)


def _skipped(
    fleet: Fleet, client: redis.Redis, locks: redis.Redis, count: int
) -> tuple[int, float]:
    hold.delay()
    _wait(fleet, lambda: bool(client.exists("held")))
    before, began = _scripts(locks), time.monotonic()
    for _ in range(count):
        hold.delay()
    _wait(fleet, lambda: not client.llen(app.conf.task_default_queue))
    asked, last_news = before, time.monotonic()
    while time.monotonic() - last_news < QUIET:
        time.sleep(0.05)
        if _scripts(locks) != asked:
            asked, last_news = _scripts(locks), time.monotonic()
    client.lpush("done", 1)
    return asked - before, last_news - began


def _left_out(
    fleet: Fleet, client: redis.Redis, locks: redis.Redis, count: int
) -> tuple[int, float]:
    hold_for_life.delay()
    _wait(fleet, lambda: bool(client.exists("held")))
    before, began = _scripts(locks), time.monotonic()
    results = [hold_for_life.delay() for _ in range(count)]
    asked, seconds = _scripts(locks) - before, time.monotonic() - began
    left = client.llen(app.conf.task_default_queue)
    if left or not all(each.is_duplicate for each in results):
        raise RuntimeError(f"a duplicate was published; {left} messages are in the queue")
    client.lpush("done", 1)
    return asked, seconds


def _wait(fleet: Fleet, condition: Callable[[], bool]) -> None:
    while not condition():
        fleet.check()
        time.sleep(0.05)


def _scripts(locks: redis.Redis) -> int:
    return int(locks.info("commandstats")["cmdstat_evalsha"]["calls"])
