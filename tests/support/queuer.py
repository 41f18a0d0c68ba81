"""One of many processes that stand in line for the same lock, as a run under ``wait`` does."""

from __future__ import annotations

import os
import time
from contextlib import closing
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

from celery_singleton_lock.lease import Lease
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claimant, Place

TTL = 60.0
#: Seconds until a process gives up that waits for the others.
LONGEST = 60.0

_start: Barrier


class Turn(NamedTuple):
    """What one process saw.

    Attributes:
        number: Its place in line, which the server gives out in the order of arrival.
        waits: How often it went to sleep for its turn: once, and once more each time that it had
            to show that it is alive.
        began: When it had the lock, by a clock that all processes share.
        ended: When it gave it back.
        fencing_token: Of its lease.
    """

    number: int
    waits: int
    began: float
    ended: float
    fencing_token: int


def join(start: Barrier) -> None:
    """Initialise the process: all are to come together."""
    global _start
    _start = start


def take_a_turn(url: str, key: str, hold: float) -> Turn:
    """Stand in line for a lock that is held, and then hold it for so long."""
    with closing(store_from_url(url, "the test")) as store:
        lease = Lease(store, key, TTL, Claimant(str(os.getpid()), "here", os.getpid()))
        store.holder(key)  # connects
        _start.wait(LONGEST)
        answer, number, waits = lease.acquire(Place()), 0, 0
        while not answer.is_acquired:
            number, waits = answer.place.number, waits + 1
            answer = lease.wait(TTL)
        began = time.monotonic()
        time.sleep(hold)
        ended = time.monotonic()
        assert lease.release()
        _start.wait(LONGEST)
    return Turn(number, waits, began, ended, lease.fencing_token)
