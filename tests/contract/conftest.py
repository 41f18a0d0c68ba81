"""One suite, every store: a new store is done when it passes.

``let_time_pass`` moves the clock of a store that has one, and sleeps through the short ttl of a
store that goes by a server's clock. ``lose_data`` does what a restart without a disk does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import LockStore
from celery_singleton_lock.stores.memory import MemoryStore
from fake_clock import FakeClock
from redis_server import RedisServer
from servers import redis_or_skip


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with redis_or_skip() as server:
        yield server


class Stage(NamedTuple):
    """A store, and what tests do to it."""

    store: LockStore
    let_time_pass: Callable[[float], None]
    lose_data: Callable[[], object]


@pytest.fixture(params=["memory", "redis"])
def stage(request):
    if request.param == "memory":
        clock = FakeClock()
        store = MemoryStore(clock=clock)
        yield Stage(store, clock.advance, store.lose_data)
        return
    server = request.getfixturevalue("redis_server")
    server.client().flushdb()
    store = store_from_url(server.url(), "the test")
    yield Stage(store, time.sleep, server.client().flushdb)
    store.close()


@pytest.fixture
def store(stage):
    return stage.store


@pytest.fixture
def let_time_pass(stage):
    return stage.let_time_pass


@pytest.fixture
def lose_data(stage):
    return stage.lose_data
