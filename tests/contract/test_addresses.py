"""Stores that are found through Celery's own connections, against a real server."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.stores.base import Claimant
from servers import redis_or_skip

ME = Claimant("me", "celery@here", 11)
PASSWORD = "s3cr3t-pw"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that wants a password and listens on a socket too."""
    socket = tmp_path_factory.mktemp("redis") / "redis.sock"
    with redis_or_skip("--requirepass", PASSWORD, "--unixsocket", str(socket)) as server:
        server.socket = socket
        yield server


def locks_of(**settings):
    app = Celery("address", set_as_current=False)
    app.conf.update({"broker_url": "memory://", "result_backend": "cache+memory://", **settings})
    return AppLocks.of(app)


def with_password(server, database):
    return server.url(database).replace("//", f"//:{PASSWORD}@")


@pytest.mark.parametrize("setting", ["broker_url", "result_backend", "singleton_store_url"])
def test_locks_are_kept_where_the_setting_says(server, setting):
    locks = locks_of(**{setting: with_password(server, 3)})

    locks.check()
    assert locks.store.acquire("singleton:{1}:1:here", "a", 60.0, ME).is_acquired

    assert locks.address.origin == setting
    with server.client(database=3, password=PASSWORD) as client:
        assert client.exists("singleton:{1}:1:here")
        client.flushdb()
    locks.store.close()


@pytest.mark.parametrize("setting", ["broker_url", "result_backend", "singleton_store_url"])
def test_a_unix_socket_is_an_address_too(server, setting):
    locks = locks_of(**{setting: f"redis+socket://:{PASSWORD}@{server.socket}?virtual_host=4"})

    locks.check()
    assert locks.store.acquire("singleton:{1}:1:here", "a", 60.0, ME).is_acquired

    assert str(locks.store) == f"unix://{server.socket}?db=4"
    with server.client(database=4, password=PASSWORD) as client:
        assert client.exists("singleton:{1}:1:here")
        client.flushdb()
    locks.store.close()


def test_the_brokers_global_key_prefix_stands_before_all_lock_keys(server):
    locks = locks_of(
        broker_url=with_password(server, 0),
        broker_transport_options={"global_keyprefix": "shop:"},
    )

    assert locks.address.key_prefix == "shop:singleton:"
    locks.store.close()
