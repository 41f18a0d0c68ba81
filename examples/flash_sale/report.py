"""What a sale came to: the table, the picture, the line for scripts, the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from timeline import Panel, draw, rows

from .sale import WAYS, Offer, Outcome

#: The picture shows this many seconds of each run, or this many thinks if that is longer.
SHOWN_SECONDS = 0.15
SHOWN_THINKS = 30


def print_table(console: Console, offer: Offer, outcomes: Sequence[Outcome]) -> None:
    """One row per way; what must not happen is red where it did."""
    title = f"{offer.buyers} buyers, {offer.tickets} tickets"
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in ("served", "sold", "over-\nsold", "over-\nlaps", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("times\nideal", justify="right")
    table.add_column("lock\ncommands\nper buyer", justify="right")
    for outcome in outcomes:
        table.add_row(
            *(outcome.name, str(outcome.served), str(outcome.sold)),
            *(_alarm(outcome.oversold), _alarm(outcome.overlaps)),
            *(f"{outcome.seconds:.1f}", _if_known(outcome.times_ideal, 2)),
            _if_known(outcome.lock_commands, 1),
        )
    console.print(table)


def draw_picture(path: Path, offer: Offer, outcomes: Sequence[Outcome]) -> None:
    """A stretch of each way as a timeline, side by side."""
    seconds = max(SHOWN_SECONDS, SHOWN_THINKS * offer.think)
    processes = rows(body for outcome in outcomes for body in outcome.bodies)
    # Not from the first one: in the rush at the beginning the machine is busy with publishing.
    first = offer.buyers // 4
    title = (
        f"Who is inside the task body? {offer.buyers} buyers, {offer.tickets} tickets; "
        f"{seconds * 1000:.0f} ms of each run, from buyer {first + 1} on"
    )
    panels = [
        Panel(
            title=outcome.name,
            verdict=f"whole run: {outcome.overlaps} overlaps, {outcome.oversold} oversold",
            is_good=outcome.overlaps == outcome.oversold == 0,
            bodies=outcome.bodies,
            rows=processes,
            begin=outcome.bodies[first].start,
        )
        for outcome in outcomes
    ]
    draw(path, title, panels, seconds, unit="ms")


def json_line(outcomes: Sequence[Outcome]) -> str:
    """All figures in one line, for scripts."""
    return json.dumps({"runs": [outcome.as_json() for outcome in outcomes]})


def faults(offer: Offer, outcomes: Sequence[Outcome]) -> list[str]:
    """What SingletonTask promised and did not keep. The other ways promise nothing."""
    found = []
    for outcome in outcomes:
        if outcome.name not in {WAYS[way][0] for way in ("singleton", "requeue")}:
            continue
        expected = min(offer.tickets, offer.buyers)
        if outcome.sold != expected:
            found.append(f"{outcome.name} sold {outcome.sold} tickets, not {expected}")
        if outcome.overlaps:
            found.append(f"{outcome.overlaps} bodies of {outcome.name} overlap")
        if outcome.served != offer.buyers:
            found.append(f"{outcome.name} served {outcome.served} of {offer.buyers} buyers")
    return found


def _if_known(figure: float | None, digits: int) -> str:
    return "\N{EN DASH}" if figure is None else f"{figure:.{digits}f}"


def _alarm(count: int) -> str:
    return f"[bold red]{count}[/]" if count else "[green]0[/]"
