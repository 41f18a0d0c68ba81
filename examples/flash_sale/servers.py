"""Which Redis servers a sale uses, and what its locks ask of them."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from fleet import own_keys
from redis_server import RedisServer, given_url

#: What clients say when they connect, and what only looks: no work of the locks.
NOT_COUNTED = {"hello", "client", "auth", "select", "ping", "info", "script", "config"}


@dataclass(frozen=True)
class Servers:
    """Where one sale lives.

    Attributes:
        url: Broker, stock and history.
        lock_url: Locks.
        key_prefix: Begins every key of this sale.
    """

    url: str
    lock_url: str
    key_prefix: str

    @property
    def is_shared(self) -> bool:
        """Locks and all the rest are in one server, together with what others do there."""
        return self.lock_url == self.url

    def lock_commands(self) -> int | None:
        """How many commands the lock server has run so far, those inside Lua scripts included.

        Returns ``None`` on a shared server: there they cannot be told from other commands.
        """
        if self.is_shared:
            return None
        with redis.Redis.from_url(self.lock_url, decode_responses=True) as client:
            before, count = -1, _commands(client)
            while count != before:  # the last release may still be on its way
                time.sleep(0.05)
                before, count = count, _commands(client)
            return count


@contextmanager
def servers() -> Iterator[Servers]:
    """The server that the environment names, else two private ones.

    Tells this process and all that it starts where they are. Removes all keys of the sale, or
    the private servers, in the end.
    """
    prefix = f"flash-sale-{secrets.token_hex(4)}:"
    url = given_url()
    if url is None:
        with RedisServer() as server, RedisServer() as lock_server:
            yield _announced(Servers(server.url(), lock_server.url(), prefix))
        return
    with own_keys(url, prefix):
        yield _announced(Servers(url, url, prefix))


def _announced(found: Servers) -> Servers:
    os.environ["FLASH_SALE_URL"] = found.url
    os.environ["FLASH_SALE_LOCK_URL"] = found.lock_url
    os.environ["FLASH_SALE_KEY_PREFIX"] = found.key_prefix
    return found


def _commands(client: redis.Redis) -> int:
    statistics = client.info("commandstats")
    return sum(
        row["calls"]
        for name, row in statistics.items()
        if name.removeprefix("cmdstat_").partition("|")[0] not in NOT_COUNTED
    )
