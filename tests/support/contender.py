"""One of many processes that want the same lock, over and over, without a pause."""

from __future__ import annotations

import os
import time
from multiprocessing.synchronize import Barrier

from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claimant

#: When the lock was held, in ns of a clock that all processes share, and its fencing token.
Held = tuple[int, int, int]

_start: Barrier


def join(start: Barrier) -> None:
    """Initialise the process: all are to start together."""
    global _start
    _start = start


def acquire_and_release(url: str, key: str, rounds: int) -> list[Held]:
    """Take the lock so many times; returns when it was held."""
    store = store_from_url(url, "the test")
    claimant = Claimant("", "here", os.getpid())
    history = []
    _start.wait(60)
    for number in range(rounds):
        owner_token = f"{claimant.pid}-{number}"
        while True:
            acquisition = store.acquire(key, owner_token, 60.0, claimant)
            if acquisition.is_acquired:
                break
        began = time.monotonic_ns()
        history.append((began, time.monotonic_ns(), acquisition.holder.fencing_token))
        assert store.release(key, owner_token)
    store.close()
    return history
