"""What the parts came to: the pictures, the line for scripts, the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from timeline import Panel, draw, rows

from .history import Outcome


def draw_picture(path: Path, title: str, outcomes: Sequence[Outcome]) -> None:
    """A part as a timeline, one panel per way."""
    panels = [
        Panel(
            title=outcome.way.title,
            verdict=_verdict(outcome),
            is_good=outcome.most_at_once <= 1,
            bodies=outcome.bodies,
            rows=rows(outcome.bodies),
            begin=outcome.fired[0],
            fired=outcome.fired,
        )
        for outcome in outcomes
    ]
    draw(path, title, panels, max(outcome.seconds for outcome in outcomes))


def json_line(outcomes: Sequence[Outcome]) -> str:
    """All figures in one line, for scripts."""
    return json.dumps({"runs": [outcome.as_json() for outcome in outcomes]})


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """What SingletonTask promised and did not keep. A plain task promises nothing."""
    return [
        f"{outcome.way.name}: {outcome.most_at_once} bodies at once"
        for outcome in outcomes
        if outcome.way.task == "report" and outcome.most_at_once > 1
    ]


def _verdict(outcome: Outcome) -> str:
    counts = [f"{len(outcome.fired)} fired", f"{len(outcome.bodies)} ran"]
    counts += [f"{outcome.skipped} skipped"] if outcome.skipped else []
    counts += [f"{outcome.expired} expired"] if outcome.expired else []
    if outcome.most_at_once > 1:
        counts.append(f"up to {outcome.most_at_once} at once")
    return ", ".join(counts)
