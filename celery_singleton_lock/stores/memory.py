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

#: The owner token of a lock that is kept after its release.
_NOBODY = ""


@dataclass
class _HeldLock:
    owner_token: str
    expires_at: float
    holder: Holder
    hold: float = 0.0

    def is_kept_for(self, task_id: str) -> bool:
        return self.owner_token == _NOBODY and self.holder.task_id == task_id != ""


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
        self._epoch = 1
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
            is_kept_for_us = held is not None and held.is_kept_for(claimant.task_id)
            if held is None or is_kept_for_us:
                self._last_fencing_token = max(self._last_fencing_token + 1, int(now * 1_000_000))
                since = now if held is None else held.holder.since
                holder = Holder(*claimant, since=since, fencing_token=self._last_fencing_token)
                held = self._locks[key] = _HeldLock(owner_token, now + ttl, holder)
            is_acquired = held.owner_token == owner_token
            if is_acquired:
                held.expires_at = now + ttl
            return Acquisition(is_acquired, held.holder, str(self._epoch) if is_acquired else "")

    def renew_many(self, claims: Sequence[Claim]) -> list[bool]:
        """See :meth:`LockStore.renew_many`."""
        return [self._renew(claim) for claim in claims]

    def release(self, key: str, owner_token: str, at_least_for: float = 0.0) -> bool:
        """See :meth:`LockStore.release`."""
        with self._mutex:
            held = self._owned(key, owner_token)
            if held is None:
                return False
            now = self._clock()
            keep = max(held.hold, held.holder.since + at_least_for - now)
            if keep <= 0:
                del self._locks[key]
            else:
                held.owner_token, held.expires_at = _NOBODY, now + keep
            return True

    def hold(self, key: str, owner_token: str, seconds: float) -> bool:
        """See :meth:`LockStore.hold`."""
        with self._mutex:
            held = self._owned(key, owner_token)
            if held is not None:
                held.hold = seconds
            return held is not None

    def restore(
        self, key: str, owner_token: str, ttl: float, holder: Holder, epoch: str
    ) -> str | None:
        """See :meth:`LockStore.restore`."""
        with self._mutex:
            held = self._living(key)
            if held is None and epoch != str(self._epoch):
                held = self._locks[key] = _HeldLock(owner_token, 0.0, holder)
                last = max(self._last_fencing_token, holder.fencing_token)
                self._last_fencing_token = last
            if held is None or held.owner_token != owner_token:
                return None
            held.expires_at = self._clock() + ttl
            return str(self._epoch)

    def lose_data(self) -> None:
        """Forget everything, as a server does that comes back empty: for tests."""
        with self._mutex:
            self._locks.clear()
            self._last_fencing_token = 0
            self._epoch += 1

    def holder(self, key: str) -> Holder | None:
        """See :meth:`LockStore.holder`."""
        with self._mutex:
            held = self._living(key)
            return None if held is None else held.holder

    def close(self) -> None:
        """See :meth:`LockStore.close`: there is no connection."""

    def __str__(self) -> str:
        return "memory://"

    def _renew(self, claim: Claim) -> bool:
        with self._mutex:
            held = self._owned(claim.key, claim.owner_token)
            if held is not None:
                held.expires_at = self._clock() + claim.ttl
            return held is not None

    def _owned(self, key: str, owner_token: str) -> _HeldLock | None:
        held = self._living(key)
        return held if held is not None and held.owner_token == owner_token else None

    def _living(self, key: str) -> _HeldLock | None:
        held = self._locks.get(key)
        if held is not None and held.expires_at <= self._clock():
            del self._locks[key]
            return None
        return held
