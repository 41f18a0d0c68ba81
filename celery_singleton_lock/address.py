"""Where an app's locks are: its own setting, else the Redis that Celery uses already.

The only place that touches private parts of Celery and kombu: neither offers a public way to
the connection options of its Redis client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import ConfigurationError, StoreError
from .options import key_prefix
from .stores import store_from_url
from .stores.base import LockStore
from .stores.memory import MemoryStore

#: Celery's own limits are made for results and messages (120 s, or none): too long for a lock.
_NOT_TAKEN_OVER = ("socket_timeout", "socket_connect_timeout", "max_connections")


@dataclass(frozen=True)
class StoreAddress:
    """An app's store, as found.

    Attributes:
        new_store: Makes the store, not connected yet. Each process makes its own.
        key_prefix: What all lock keys of the app begin with.
        origin: The setting that led here, for people.
    """

    new_store: Callable[[], LockStore]
    key_prefix: str
    origin: str


def find_store(app: Any) -> StoreAddress:
    """The store of ``app``.

    ``singleton_store_url``, else its Redis result backend, else its Redis broker; in eager mode
    without any of them, this process's memory.

    Raises:
        ConfigurationError: There is none, or its address makes no sense.
        StoreError: The broker, whose connection shows the address, did not answer.
    """
    url = app.conf.get("singleton_store_url")
    if url:
        new_store = partial(store_from_url, url, "The setting singleton_store_url")
        new_store()  # a wrong URL shows now
        return StoreAddress(new_store, key_prefix(app, "", ""), "singleton_store_url")
    address = _from_result_backend(app) or _from_broker(app)
    if address is not None:
        return address
    if app.conf.task_always_eager:
        return StoreAddress(MemoryStore, key_prefix(app, "", ""), "task_always_eager")
    raise ConfigurationError(
        "There is no Redis for the locks: set singleton_store_url, for example "
        "'redis://localhost:6379/0', or use a Redis as result_backend or broker_url"
    )


def _from_result_backend(app: Any) -> StoreAddress | None:
    from celery.backends.redis import RedisBackend, SentinelBackend

    backend = app.backend
    if isinstance(backend, SentinelBackend):
        raise _sentinel_error("result_backend")
    if not isinstance(backend, RedisBackend):
        return None
    prefix = app.conf.get("result_backend_transport_options", {}).get("global_keyprefix", "")
    if prefix and prefix[-1] not in ":_-.":
        prefix += "_"  # as Celery does with its result keys
    return _redis_address(app, backend.connparams, prefix, "result_backend")


def _from_broker(app: Any) -> StoreAddress | None:
    with app.connection_for_write() as connection:
        if connection.transport.driver_type != "redis":
            return None
        from kombu.transport.redis import SentinelTransport
        from redis.exceptions import RedisError

        if isinstance(connection.transport, SentinelTransport):
            raise _sentinel_error("broker_url")
        try:
            channel = connection.channel()  # connects: only a live channel knows its options
        except (RedisError, OSError, *connection.connection_errors) as error:
            raise StoreError(
                f"The broker {connection.as_uri()}, which is to keep the locks, did not answer: "
                f"{error}. See that a Redis answers at broker_url, or set singleton_store_url"
            ) from error
        return _redis_address(app, channel._connparams(), channel.global_keyprefix, "broker_url")


def _redis_address(
    app: Any, connection_kwargs: Mapping[str, Any], prefix: str, origin: str
) -> StoreAddress:
    from .stores.redis import RedisStore

    kwargs = {
        name: value for name, value in connection_kwargs.items() if name not in _NOT_TAKEN_OVER
    }
    prefix_origin = f"The global_keyprefix of {origin}"
    return StoreAddress(partial(RedisStore, kwargs), key_prefix(app, prefix, prefix_origin), origin)


def _sentinel_error(setting: str) -> ConfigurationError:
    return ConfigurationError(
        f"{setting} is a Redis Sentinel, which cannot keep locks yet: set singleton_store_url to "
        "a Redis that is reached without Sentinel"
    )
