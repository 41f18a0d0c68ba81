"""The parts one after the other, and what is shown of them."""

from __future__ import annotations

import sys
from pathlib import Path

import redis
from rich.console import Console

from fleet import Fleet, FleetError
from redis_server import RedisServerNotFound

from . import tasks
from .display import Display, outcome_table
from .history import Outcome
from .parts import StalledError, run_away, run_overlap
from .report import draw_picture, faults, json_line
from .servers import server
from .ways import EVERY, TAKES

OVERLAP = f"Every {EVERY:g} s beat fires a task that takes {TAKES:g} s"
AWAY = "The same, while the workers are away for {:g} s"


def compare(seconds: float, away: float, output: Path) -> int:
    """Run the parts, show what came of them, and return the exit code."""
    console = Console()
    try:
        outcomes = _run_parts(console, seconds, away, output)
    except (FleetError, StalledError, RedisServerNotFound, redis.RedisError) as error:
        print(f"beat_overlap: {error}", file=sys.stderr)
        return 1
    console.print(f"The timelines are in {output}", soft_wrap=True)
    broken = faults(outcomes)
    for fault in broken:
        print(f"beat_overlap: {fault}", file=sys.stderr)
    print(json_line(outcomes), flush=True)  # not by rich, which would wrap it
    return 1 if broken else 0


def _run_parts(console: Console, seconds: float, away: float, output: Path) -> list[Outcome]:
    with server() as prefix, Fleet(tasks.app, prefix.rstrip(":")) as fleet:
        with Display(console, OVERLAP) as display:
            outcomes = run_overlap(fleet, display, seconds)
        _show(console, OVERLAP, outcomes, output / "beat-overlap.png")
        if not away:
            return outcomes
        title = AWAY.format(away)
        with Display(console, title) as display:
            outcomes_away = run_away(fleet, display, away)
        _show(console, title, outcomes_away, output / "beat-away.png")
    return outcomes + outcomes_away


def _show(console: Console, title: str, outcomes: list[Outcome], picture: Path) -> None:
    if not console.is_terminal:  # there the last state of the display stays
        console.print(outcome_table(title, outcomes))
    draw_picture(picture, title, outcomes)
