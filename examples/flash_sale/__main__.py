"""The command: ``python -m flash_sale``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from fleet import end_if_asked, note_signals
from timeline import picture_folder

WAYS = ("plain", "singleton", "requeue", "spin")
DESCRIPTION = """\
Sell few tickets to many buyers, on several real Celery workers, in four ways: with a plain task,
with SingletonTask whose buyers stand in line, with SingletonTask whose buyers go back to the
queue, and with the spin lock of the tutorials. Shows who was oversold, what it cost, and a
timeline of who was in the task body when.
"""
EPILOG = """\
The last line of the output is one JSON object. The exit code is 0 when SingletonTask sold exactly
what there was, one buyer at a time, with everybody served. With SINGLETON_REDIS_URL set, that
Redis is used for everything (and lock commands are not counted); otherwise two private servers
are started.
"""


def main() -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args()
    note_signals()
    # Not at the top: --help and wrong options are answered without Celery, and from here on
    # Ctrl-C ends the program in good order.
    from .comparison import compare

    code = compare(
        ways=[arguments.only] if arguments.only else WAYS,
        buyers=arguments.buyers,
        tickets=arguments.tickets,
        think=arguments.think / 1000,
        workers=arguments.workers,
        slots=arguments.slots,
        output=arguments.output,
    )
    end_if_asked()  # while the picture was drawn
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flash_sale", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    whole = _number(int, 1, 1_000_000)
    add("--buyers", type=whole, default=300, metavar="N", help="who want a ticket (%(default)s)")
    add("--tickets", type=whole, default=10, metavar="N", help="on sale (%(default)s)")
    add(
        *("--workers", "-w"),
        type=_number(int, 1, 16),
        default=2,
        metavar="N",
        help="worker processes (%(default)s)",
    )
    add(
        *("--slots", "-c"),
        type=_number(int, 1, 32),
        default=4,
        metavar="N",
        help="pool processes of each worker (%(default)s)",
    )
    add(
        "--think",
        type=_number(float, 0, 10_000),
        default=5.0,
        metavar="MS",
        help="milliseconds between a buyer's look and the purchase (%(default)g)",
    )
    add(
        "--output",
        type=picture_folder,
        default="results",
        metavar="FOLDER",
        help="where the picture goes (./%(default)s)",
    )
    add("--only", choices=WAYS, help="run one way alone")
    return parser


def _number(kind: type, least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return value  # type: ignore[no-any-return]

    # argparse shows this name where the text is no number at all.
    number.__name__ = "whole number" if kind is int else "number"
    return number


if __name__ == "__main__":
    sys.exit(main())
