"""What the bodies of the worker tests did: each writes down its start and its end, in Redis.

Times are ``time.monotonic()``: on one machine one clock for all processes, and it does not step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from uuid import uuid4

import redis

from waiting import wait_until

PREFIX = "worker_app:history:"
EFFECTS = "worker_app:effects:"
#: Seconds that a history is kept: in a Redis that is not ours, nothing stays behind.
KEPT_FOR = 600


class Run(NamedTuple):
    """One execution of a body.

    Attributes:
        task_name: The task.
        task_id: Its id; several runs can have the same one.
        label: What the test calls the thing that is locked.
        pid: The process that ran it.
        retries: As its request says.
        fencing_token: Of its lease.
        start: When the body began.
        end: When it ended, however it did; infinite as long as it runs, and after a kill.
    """

    task_name: str
    task_id: str
    label: str
    pid: int
    retries: int
    fencing_token: int
    start: float
    end: float = float("inf")

    @property
    def is_over(self) -> bool:
        """Whether the body wrote down its end."""
        return self.end != float("inf")


class History:
    """Runs by label, as their bodies wrote them down.

    Args:
        client: A client that decodes to str.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    @contextmanager
    def recorded(self, run: Run) -> Iterator[None]:
        """Write down ``run`` at once, and its end when the ``with`` block ends."""
        place = uuid4().hex
        try:  # what ends a body can come while its start is written
            self._write(place, run)
            yield
        finally:
            self._write(place, run._replace(end=time.monotonic()))

    def runs(self, *labels: str) -> list[Run]:
        """All runs of these labels, in the order of their starts."""
        values = [value for label in labels for value in self._client.hvals(PREFIX + label)]
        return sorted((Run(*json.loads(value)) for value in values), key=lambda run: run.start)

    def note_effect(self, label: str, task_id: str) -> None:
        """Do what a body is there for: once or several times makes no difference."""
        self._client.sadd(EFFECTS + label, task_id)
        self._client.expire(EFFECTS + label, KEPT_FOR)

    def effects(self, *labels: str) -> set[str]:
        """The task ids whose effects are there."""
        return self._client.sunion([EFFECTS + label for label in labels])

    def wait_for_starts(self, *labels: str, count: int = 1) -> list[Run]:
        """Wait until at least ``count`` runs of these labels have started."""

        def started() -> list[Run]:
            runs = self.runs(*labels)
            return runs if len(runs) >= count else []

        return wait_until(started, f"{count} runs of {labels} have started")

    def wait_for_ends(self, *labels: str, count: int = 1) -> list[Run]:
        """Wait until at least ``count`` runs of these labels have ended."""

        def ended() -> list[Run]:
            runs = self.runs(*labels)
            return runs if sum(run.is_over for run in runs) >= count else []

        return wait_until(ended, f"{count} runs of {labels} have ended")

    def _write(self, place: str, run: Run) -> None:
        self._client.hset(PREFIX + run.label, place, json.dumps(run))
        self._client.expire(PREFIX + run.label, KEPT_FOR)
