"""Where the locks are: found in the app's configuration, without connecting."""

from __future__ import annotations

import pytest
import redis
from celery import Celery

from celery_singleton_lock.address import find_store
from celery_singleton_lock.errors import ConfigurationError
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.memory import MemoryStore
from celery_singleton_lock.stores.redis import COMMAND_TIMEOUT, RedisStore

SECRET = "s3cr3t-pw"


def an_app(**settings):
    app = Celery("address", set_as_current=False)
    app.conf.update(broker_url="memory://", **settings)
    return app


def connection_kwargs(store: RedisStore) -> dict:
    return store._client.connection_pool.connection_kwargs


def test_the_setting_comes_first():
    address = find_store(
        an_app(singleton_store_url="redis://locks:1234/5", result_backend="redis://results/1")
    )

    assert str(address.new_store()) == "redis://locks:1234/5"
    assert address.origin == "singleton_store_url"
    assert address.key_prefix == "singleton:"


def test_else_the_result_backend_with_all_its_options():
    address = find_store(
        an_app(
            result_backend=f"redis://user:{SECRET}@results:1234/5",
            redis_socket_keepalive=True,
            redis_backend_health_check_interval=17,
            result_backend_transport_options={"global_keyprefix": "shop"},
        )
    )
    store = address.new_store()
    kwargs = connection_kwargs(store)

    assert str(store) == "redis://results:1234/5"
    assert address.origin == "result_backend"
    assert (kwargs["username"], kwargs["password"]) == ("user", SECRET)
    assert kwargs["socket_keepalive"] is True
    assert kwargs["health_check_interval"] == 17
    assert address.key_prefix == "shop_singleton:"  # as Celery puts it before its own keys


def test_tls_of_the_result_backend_is_taken_over():
    address = find_store(
        an_app(
            result_backend="rediss://results:1234/0",
            redis_backend_use_ssl={"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.pem"},
        )
    )

    store = address.new_store()
    assert str(store) == "rediss://results:1234/0"
    assert issubclass(store._client.connection_pool.connection_class, redis.SSLConnection)
    assert connection_kwargs(store)["ssl_ca_certs"] == "/ca.pem"


def test_a_unix_socket_of_the_result_backend_is_taken_over():
    address = find_store(an_app(result_backend="redis+socket:///run/redis.sock?virtual_host=3"))

    assert str(address.new_store()) == "unix:///run/redis.sock?db=3"


def test_commands_are_bounded_by_seconds_whatever_celery_waits_for_its_results():
    kwargs = connection_kwargs(
        find_store(an_app(result_backend="redis://results", redis_socket_timeout=120)).new_store()
    )

    assert kwargs["socket_timeout"] == kwargs["socket_connect_timeout"] == COMMAND_TIMEOUT


def test_a_command_is_sent_once():
    store = find_store(an_app(singleton_store_url="redis://locks")).new_store()
    connection = store._client.connection_pool.make_connection()

    assert connection.retry._retries == 0


def test_the_url_may_set_its_own_limits():
    store = store_from_url("redis://locks/0?socket_timeout=0.5", "x")

    assert connection_kwargs(store)["socket_timeout"] == 0.5


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://", "redis://localhost:6379/0"),
        ("redis://host", "redis://host:6379/0"),
        ("redis://[::1]:1", "redis://[::1]:1/0"),
        (f"redis://user:{SECRET}@host:1/2", "redis://host:1/2"),
        (f"redis://host/1?password={SECRET}", "redis://host:6379/1"),
        ("rediss://host?ssl_cert_reqs=CERT_REQUIRED", "rediss://host:6379/0"),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
        ("redis+socket:///run/redis.sock?virtual_host=2", "unix:///run/redis.sock?db=2"),
    ],
)
def test_urls_and_what_people_are_shown_of_them(url, address):
    assert str(store_from_url(url, "x")) == address


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "",
        5,
        f"amqp://user:{SECRET}@host",
        f"redis://:{SECRET}@host:port",
        f"redis://:{SECRET}/with/slashes@host:1",
        "redis://host/zero",
        f"redis://:12#{SECRET}@host:6379/0",
        f"redis://:12?{SECRET}@host",
        "rediss://host/0?ssl_cert_reqs=bogus",
        "redis://host/0?socket_timeout=soon",
        f"redis://host/0?passwrod={SECRET}",
        "memory://host",
    ],
)
def test_a_wrong_url_names_the_setting_and_never_the_password(url):
    with pytest.raises(ConfigurationError, match="The setting singleton_store_url") as caught:
        store_from_url(url, "The setting singleton_store_url")

    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_without_any_redis_the_error_says_what_to_set():
    with pytest.raises(ConfigurationError, match="set singleton_store_url"):
        find_store(an_app(result_backend="cache+memory://"))


def test_sentinel_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="result_backend is a Redis Sentinel"):
        find_store(
            an_app(
                result_backend="sentinel://a:26379;sentinel://b:26379",
                result_backend_transport_options={"master_name": "main"},
            )
        )


def test_eager_mode_without_a_redis_locks_in_memory():
    assert isinstance(find_store(an_app(task_always_eager=True)).new_store(), MemoryStore)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"singleton_key_prefix": "{shop}:"}, "The setting singleton_key_prefix"),
        ({"singleton_key_prefix": 5}, "The setting singleton_key_prefix"),
        (
            {"result_backend_transport_options": {"global_keyprefix": "{shop}"}},
            "The global_keyprefix of result_backend",
        ),
    ],
)
def test_a_wrong_key_prefix_is_refused_by_the_name_of_its_setting(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        find_store(an_app(result_backend="redis://results", **settings))
