"""The two parts: workers that are there all the time, and workers that were away for a while."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from fleet import Fleet

from .display import Display
from .history import Outcome, read_outcome
from .ways import EVERY, PARTS, Way

#: Pool processes of each worker: enough for all copies that overlap while beat fires.
SLOTS = 4
#: Seconds that beat goes on firing after the workers are back.
BACK_FOR = 4 * EVERY
#: Seconds between two looks, and seconds without news until nothing is waited for any longer.
LOOK_EVERY = 0.1
STALLED_AFTER = 60.0


class StalledError(RuntimeError):
    """Beat does not fire, or what it fired neither runs nor ends otherwise."""


def run_overlap(fleet: Fleet, display: Display, seconds: float) -> list[Outcome]:
    """Let beat fire for ``seconds`` while the workers are there."""
    part = _Part("overlap", fleet, display)
    part.start_workers()
    part.start_beat()
    part.look_for(seconds - EVERY / 2)  # not at the moment when it fires
    return part.finish()


def run_away(fleet: Fleet, display: Display, seconds: float) -> list[Outcome]:
    """Let beat fire for ``seconds`` while the workers are away, and see what they then find."""
    part = _Part("away", fleet, display)
    part.start_beat()
    part.look_for(seconds - EVERY / 2)
    part.start_workers()
    part.look_for(BACK_FOR)
    return part.finish()


class _Part:
    """Starts and stops what one part needs, and keeps the display up to date."""

    def __init__(self, name: str, fleet: Fleet, display: Display) -> None:
        self._name = name
        self._ways: Sequence[Way] = PARTS[name]
        self._waiting = [0] * len(self._ways)
        self._fleet = fleet
        self._display = display

    def start_workers(self) -> None:
        self._waiting = [len(outcome.fired) for outcome in self.look()]
        for way in self._ways:
            self._fleet.start_worker(way.queue, SLOTS, way.queue)
        self._fleet.wait_until_ready()

    def start_beat(self) -> None:
        """Start beat, and return when it has fired for the first time."""
        os.environ["BEAT_OVERLAP_PART"] = self._name  # celeryconfig.py reads it, in beat's process
        self._fleet.start_beat()
        self._wait_until(lambda outcome: bool(outcome.fired))

    def look_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(LOOK_EVERY)

    def finish(self) -> list[Outcome]:
        """Stop beat, wait for the last runs, and send the workers home."""
        self._fleet.stop("beat")
        outcomes = self._wait_until(lambda outcome: outcome.received >= len(outcome.fired))
        self._fleet.stop(*(way.queue for way in self._ways))
        return outcomes

    def look(self) -> list[Outcome]:
        self._fleet.check()
        outcomes = [read_outcome(*each) for each in zip(self._ways, self._waiting, strict=True)]
        self._display.show(outcomes)
        return outcomes

    def _wait_until(self, is_reached: Callable[[Outcome], bool]) -> list[Outcome]:
        outcomes, last_news = self.look(), time.monotonic()
        while not all(map(is_reached, outcomes)):
            time.sleep(LOOK_EVERY)
            before, outcomes = outcomes, self.look()
            if outcomes != before:
                last_news = time.monotonic()
            elif time.monotonic() - last_news > STALLED_AFTER:
                raise StalledError(f"Nothing has happened for {STALLED_AFTER:g} seconds")
        return outcomes
