"""The command: ``python -m beat_overlap``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from fleet import end_if_asked, note_signals
from timeline import picture_folder

DESCRIPTION = """\
A real celery beat fires every second a task that takes almost three. Compares a plain task, whose
copies overlap, with SingletonTask, whose never do; then lets the workers be away for a while, and
shows what waits for them, with and without "expires".
"""
EPILOG = """\
The last line of the output is one JSON object. The exit code is 0 when no two runs of
SingletonTask overlapped. With SINGLETON_REDIS_URL set, that Redis is used; otherwise a private
server is started.
"""


def main() -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args()
    note_signals()
    # Not at the top: --help and wrong options are answered without Celery, and from here on
    # Ctrl-C ends the program in good order.
    from .comparison import compare

    code = compare(arguments.seconds, arguments.away, arguments.output)
    end_if_asked()  # while the picture was drawn
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("beat_overlap", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--seconds",
        type=_seconds(4),
        default=12.0,
        metavar="N",
        help="how long beat fires in the first part (%(default)g)",
    )
    parser.add_argument(
        "--away",
        type=_seconds(0),
        default=5.0,
        metavar="N",
        help="how long the workers are away in the second part; 0 leaves it out (%(default)g)",
    )
    parser.add_argument(
        "--output",
        type=picture_folder,
        default="results",
        metavar="FOLDER",
        help="where the pictures go (./%(default)s)",
    )
    return parser


def _seconds(least: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not least <= value <= 3600:
            raise argparse.ArgumentTypeError(f"must be {least:g} to 3600, not {text}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
