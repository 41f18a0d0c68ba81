"""Who has a lock, from moment to moment, and which of the processes that had it still live."""

from __future__ import annotations

import time
from threading import Event, Thread
from typing import Any, NamedTuple

import psutil
import redis

from history import Run

#: Seconds between two looks; a busy machine makes it more.
LOOK_EVERY = 0.003


class Sample(NamedTuple):
    """One look at the lock.

    Attributes:
        asked_at: When the store was asked, by ``time.monotonic()``.
        answered_at: When it had answered.
        owner_token: Whose the lock was in between; ``None`` when it was free.
    """

    asked_at: float
    answered_at: float
    owner_token: str | None


class LockWatch:
    """Looks at one lock while a ``with`` block runs.

    Args:
        client: A client of the lock server, for this alone.
        key: The lock key.

    Attributes:
        samples: All looks so far.
    """

    def __init__(self, client: redis.Redis, key: str) -> None:
        self.samples: list[Sample] = []
        self._client = client
        self._key = key
        self._last_alive: dict[int, float] = {}
        self._first_dead: dict[int, float] = {}
        self._is_over = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> LockWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()

    def follow(self, pid: int, alive_at: float) -> None:
        """Note from now on whether this process lives; it did at ``alive_at``."""
        self._last_alive.setdefault(pid, alive_at)

    def is_dead(self, pid: int) -> bool:
        """Whether a process that is followed has ended."""
        return pid in self._first_dead

    def last_alive(self, pid: int) -> float:
        """When it was seen alive for the last time."""
        return self._last_alive[pid]

    def over(self, run: Run) -> float:
        """By when the run's body was over: its end, or the first look at a dead process."""
        was_killed = run.end == self._last_alive.get(run.pid) and run.pid in self._first_dead
        return self._first_dead[run.pid] if was_killed else run.end

    def is_free(self) -> bool:
        """Whether the lock was free at the last look that began after this call."""
        called_at, seen = time.monotonic(), len(self.samples)
        while not (new := self.samples[seen:]) or new[-1].asked_at < called_at:
            time.sleep(LOOK_EVERY)
        return new[-1].owner_token is None

    def free_since(self) -> float:
        """When it was first seen free, of the time that lasts until now."""
        held = [n for n, sample in enumerate(self.samples) if sample.owner_token is not None]
        first_free = self.samples[held[-1] + 1 if held else 0]
        return first_free.answered_at

    def owners_within(self, start: float, end: float) -> set[str | None]:
        """The owner tokens at all looks that lie within this time, ``None`` for a free lock."""
        return {
            sample.owner_token
            for sample in self.samples
            if sample.asked_at > start and sample.answered_at < end
        }

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_EVERY):
            asked_at = time.monotonic()
            owner_token = self._client.hget(self._key, "owner_token")
            self.samples.append(Sample(asked_at, time.monotonic(), owner_token))
            for pid in list(self._last_alive):
                looked_at = time.monotonic()
                if self.is_dead(pid):
                    continue
                if executes(pid):
                    self._last_alive[pid] = looked_at
                else:
                    self._first_dead[pid] = time.monotonic()


def executes(pid: int) -> bool:
    """Whether a process can still do anything; one that waits to be reaped cannot."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
