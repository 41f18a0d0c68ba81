"""What became of all that beat fired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timeline import Body, most_at_once, overlaps, read_bodies

from . import tasks
from .ways import Way


@dataclass(frozen=True)
class Outcome:
    """What one way came to so far.

    Attributes:
        way: The way.
        waiting: How many messages waited when the workers came (back).
        fired: When beat fired.
        bodies: The runs that have ended.
        skipped: How many runs were skipped, because another one held the lock.
        expired: How many messages were too old to be run.
    """

    way: Way
    waiting: int
    fired: Sequence[float]
    bodies: Sequence[Body]
    skipped: int
    expired: int

    @property
    def received(self) -> int:
        """How many messages have reached a worker and come to an end there."""
        return len(self.bodies) + self.skipped + self.expired

    @property
    def most_at_once(self) -> int:
        """How many bodies were running at the same moment, at most."""
        return most_at_once(self.bodies)

    @property
    def seconds(self) -> float:
        """From the first firing to the end of the last body."""
        return max(body.end for body in self.bodies) - self.fired[0] if self.bodies else 0.0

    def as_json(self) -> dict[str, Any]:
        """The figures, for scripts."""
        return {
            "name": self.way.name,
            "fired": len(self.fired),
            "waiting": self.waiting,
            "received": self.received,
            "ran": len(self.bodies),
            "skipped": self.skipped,
            "expired": self.expired,
            "most_at_once": self.most_at_once,
            "overlaps": overlaps(self.bodies),
            "seconds": round(self.seconds, 3),
        }


def read_outcome(way: Way, waiting: int = 0) -> Outcome:
    """The outcome of ``way`` so far; ``waiting`` is passed on."""
    client = tasks.client()
    return Outcome(
        way=way,
        waiting=waiting,
        fired=[float(time) for time in client.lrange(tasks.key("fired", way.queue), 0, -1)],
        bodies=read_bodies(client, tasks.key("ran", way.queue)),
        skipped=int(client.llen(tasks.key("skipped", way.queue))),
        expired=int(client.llen(tasks.key("expired", way.queue))),
    )
