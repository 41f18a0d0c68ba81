"""The lock that tutorials show, here to be compared with. Do not copy it.

It excludes, as long as nothing goes wrong:

- killed between SETNX and EXPIRE, it locks the item for ever;
- killed later, it locks the item until the ttl is over;
- slower than the ttl, it lets a second run in, and then deletes the second run's lock;
- and while it waits it asks the server a thousand times a second, and fills a worker slot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

LOCK_TTL = 30
PAUSE = 0.001


@contextmanager
def spin_lock(client: redis.Redis, key: str) -> Iterator[None]:
    """Hold ``key`` for the ``with`` block; asks for it until it gets it."""
    while not client.setnx(key, "held"):
        time.sleep(PAUSE)
    client.expire(key, LOCK_TTL)
    try:
        yield
    finally:
        client.delete(key)
