"""The sale: one race in the body, and four tasks that run it."""

from __future__ import annotations

import time
from functools import cache

import redis
from celery import Celery, Task, current_task
from celery.signals import worker_process_init

from celery_singleton_lock import SingletonTask
from timeline import write_body

from .spin_lock import spin_lock

app = Celery("flash_sale.tasks")
app.config_from_object("flash_sale.celeryconfig")


@app.task(base=Task)
def buy_plain(item: str, buyer: int, think: float) -> None:
    """Nothing keeps two buyers apart."""
    sell_if_left(item, buyer, think)


# Each slot has one buyer in line: with many slots and much to think, more than 60 s of them.
@app.task(base=SingletonTask, lock_args="item", on_conflict="wait", wait_timeout=24 * 3600)
def buy(item: str, buyer: int, think: float) -> None:
    """One buyer per item at a time. The others stand in line in their slots."""
    sell_if_left(item, buyer, think)


@app.task(base=SingletonTask, lock_args="item", on_conflict="requeue")
def buy_with_requeue(item: str, buyer: int, think: float) -> None:
    """One buyer per item at a time. The others go back to the queue and keep their place."""
    sell_if_left(item, buyer, think)


@app.task(base=Task)
def buy_with_spin_lock(item: str, buyer: int, think: float) -> None:
    """One buyer per item at a time. The others wait in their slots and ask without end."""
    with spin_lock(lock_client(), key("spin-lock", item)):
        sell_if_left(item, buyer, think)


def sell_if_left(item: str, buyer: int, think: float) -> None:
    """Read the stock, think for ``think`` seconds, write the stock: an honest race.

    Any order of two runs is right as long as one is over before the other begins.
    """
    start = time.monotonic()
    stock = int(sale_client().get(key("stock", item)) or 0)
    time.sleep(think)
    if stock > 0:
        sale_client().set(key("stock", item), stock - 1)
        sale_client().rpush(key("sales", item), buyer)
    write_body(sale_client(), key("served", item), current_task.request.hostname, start)


def key(kind: str, item: str) -> str:
    """Where the ``stock``, the ``sales``, the bodies (``served``) of an item are kept."""
    return f"{app.conf.singleton_key_prefix}{kind}:{item}"


@cache
def sale_client() -> redis.Redis:
    """The server with the stock, which is also the broker."""
    return redis.Redis.from_url(app.conf.broker_url, decode_responses=True)


@cache
def lock_client() -> redis.Redis:
    """The server with the locks."""
    return redis.Redis.from_url(app.conf.singleton_store_url, decode_responses=True)


@worker_process_init.connect
def connect(**_: object) -> None:
    """Connect before the sale begins, or the first buyers would pay for it."""
    sale_client().ping()
    lock_client().ping()
