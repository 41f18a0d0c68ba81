"""Locks in this process's memory: for tests and eager mode, and the readable specification.

It excludes the threads and greenlets of one process from each other, and nobody else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from ..errors import Holder
from .base import Acquisition, Claim, Claimant, LockStore


@dataclass
class _HeldLock:
    owner_token: str
    expires_at: float
    holder: Holder


class MemoryStore(LockStore):
    """A store for one process.

    Args:
        clock: Seconds since the epoch. It plays the server's clock: expiry, ``since`` and
            fencing tokens go by it.
    """

    is_shared_between_processes = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._locks: dict[str, _HeldLock] = {}
        self._last_fencing_token = 0
        self._mutex = Lock()

    @classmethod
    def from_url(cls, url: str) -> MemoryStore:
        """A new, empty store: ``memory://`` has no options."""
        if url != "memory://":
            raise ValueError("memory:// takes no host, path or options")
        return cls()

    def acquire(self, key: str, owner_token: str, ttl: float, claimant: Claimant) -> Acquisition:
        """See :meth:`LockStore.acquire`."""
        with self._mutex:
            now = self._clock()
            held = self._living(key)
            if held is None:
                self._last_fencing_token = max(self._last_fencing_token + 1, int(now * 1_000_000))
                holder = Holder(*claimant, since=now, fencing_token=self._last_fencing_token)
                held = self._locks[key] = _HeldLock(owner_token, now + ttl, holder)
            is_acquired = held.owner_token == owner_token
            if is_acquired:
                held.expires_at = now + ttl
            return Acquisition(is_acquired, held.holder)

    def renew_many(self, claims: Sequence[Claim]) -> list[bool]:
        """See :meth:`LockStore.renew_many`."""
        return [self._renew(claim) for claim in claims]

    def release(self, key: str, owner_token: str) -> bool:
        """See :meth:`LockStore.release`."""
        with self._mutex:
            held = self._living(key)
            if held is None or held.owner_token != owner_token:
                return False
            del self._locks[key]
            return True

    def holder(self, key: str) -> Holder | None:
        """See :meth:`LockStore.holder`."""
        with self._mutex:
            held = self._living(key)
            return None if held is None else held.holder

    def check(self) -> None:
        """See :meth:`LockStore.check`: memory always answers."""

    def close(self) -> None:
        """See :meth:`LockStore.close`: there is no connection."""

    def __str__(self) -> str:
        return "memory://"

    def _renew(self, claim: Claim) -> bool:
        with self._mutex:
            held = self._living(claim.key)
            if held is None or held.owner_token != claim.owner_token:
                return False
            held.expires_at = self._clock() + claim.ttl
            return True

    def _living(self, key: str) -> _HeldLock | None:
        held = self._locks.get(key)
        if held is not None and held.expires_at <= self._clock():
            del self._locks[key]
            return None
        return held
