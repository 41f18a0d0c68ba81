"""One suite, every store: a new store is done when it passes.

``let_time_pass`` moves the clock of a store that has one, and sleeps through the short ttl of a
store that goes by a server's clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.memory import MemoryStore
from fake_clock import FakeClock
from redis_server import RedisServer
from servers import redis_or_skip


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with redis_or_skip() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
def store_and_clock(request):
    if request.param == "memory":
        clock = FakeClock()
        yield MemoryStore(clock=clock), clock.advance
        return
    server = request.getfixturevalue("redis_server")
    server.client().flushdb()
    store = store_from_url(server.url(), "the test")
    yield store, time.sleep
    store.close()


@pytest.fixture
def store(store_and_clock):
    return store_and_clock[0]


@pytest.fixture
def let_time_pass(store_and_clock):
    return store_and_clock[1]
