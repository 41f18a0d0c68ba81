"""All ways of running the sale, one after another on the same workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import redis
from rich.console import Console

from fleet import Fleet, FleetError
from redis_server import RedisServerNotFound

from . import tasks
from .progress import display
from .report import draw_picture, faults, json_line, print_table
from .sale import WAYS, Offer, Outcome, SaleStalledError, run_sale
from .servers import servers


def compare(
    ways: Sequence[str],
    buyers: int,
    tickets: int,
    think: float,
    workers: int,
    slots: int,
    output: Path,
) -> int:
    """Run the sale in each way, show what came of it, and return the exit code."""
    offer = Offer(buyers, tickets, think)
    console = Console()
    try:
        outcomes = _run_all(console, ways, offer, workers, slots)
    except (FleetError, SaleStalledError, RedisServerNotFound, redis.RedisError) as error:
        print(f"flash_sale: {error}", file=sys.stderr)
        return 1
    picture = output / "flash-sale.png"
    draw_picture(picture, offer, outcomes)
    print_table(console, offer, outcomes)
    console.print(f"The timeline is in {picture}", soft_wrap=True)
    broken = faults(offer, outcomes)
    for fault in broken:
        print(f"flash_sale: {fault}", file=sys.stderr)
    print(json_line(outcomes), flush=True)  # not by rich, which would wrap it
    return 1 if broken else 0


def _run_all(
    console: Console, ways: Sequence[str], offer: Offer, workers: int, slots: int
) -> list[Outcome]:
    names = [WAYS[way][0] for way in ways]
    with ExitStack() as stack:
        found = stack.enter_context(servers())
        fleet = stack.enter_context(Fleet(tasks.app, found.key_prefix.rstrip(":")))
        console.print(f"Starting {workers} workers with {slots} slots each …")
        for number in range(1, workers + 1):
            fleet.start_worker(f"worker{number}", slots, "buyers")
        fleet.wait_until_ready()
        shown = stack.enter_context(display(console, names, offer.buyers))
        return [run_sale(way, offer, found, fleet, shown) for way in ways]
