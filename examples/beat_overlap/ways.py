"""What beat fires, and how: the ways to compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Seconds from one firing to the next, and seconds that the task takes.
EVERY = 1.0
TAKES = 2.8


@dataclass(frozen=True)
class Way:
    """One entry of the schedule, with a queue and a worker of its own.

    Attributes:
        title: What people call it.
        queue: Its queue, its worker, and the argument by which its runs are told apart.
        task: What beat fires.
        expires: After so many seconds in the queue a message is too old to be run.
    """

    title: str
    queue: str
    task: str
    expires: float | None = None

    @property
    def name(self) -> str:
        """What scripts call it: in their line the parts stand side by side."""
        return f"{self.title}, away" if self in PARTS["away"] else self.title

    def entry(self) -> dict[str, Any]:
        """Its entry in ``beat_schedule``."""
        return {
            "task": f"beat_overlap.tasks.{self.task}",
            "schedule": EVERY,
            "kwargs": {"way": self.queue},
            "options": {"queue": self.queue, "expires": self.expires},
        }


#: Part of the example → what is compared in it.
PARTS = {
    "overlap": (
        Way("plain Task", "plain", "report_plain"),
        Way("SingletonTask", "singleton", "report"),
    ),
    "away": (
        Way("plain Task", "away-plain", "report_plain"),
        Way("SingletonTask", "away-singleton", "report"),
        Way("SingletonTask + expires", "away-expires", "report", expires=EVERY),
    ),
}
