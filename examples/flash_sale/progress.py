"""How far the sale is: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Seconds between two lines.
LINE_EVERY = 2.0


class Display(Protocol):
    """Shows how many buyers of each way have been served."""

    def begin(self, name: str) -> None:
        """The clock of this way starts now."""

    def show(self, name: str, served: int) -> None:
        """So many have been served by now."""


@contextmanager
def display(console: Console, names: Sequence[str], buyers: int) -> Iterator[Display]:
    """Bars or lines, as fits the console, for the ``with`` block."""
    if not console.is_terminal:
        yield _Lines(buyers)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Drawn when there is news, without a thread: workers may be started while it is shown.
    bars = Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False)
    with bars:
        yield _Bars(bars, names, buyers)


class _Bars:
    def __init__(self, bars: Progress, names: Sequence[str], buyers: int) -> None:
        self._bars = bars
        self._rows = {name: bars.add_task(name, start=False, total=buyers) for name in names}
        bars.refresh()

    def begin(self, name: str) -> None:
        self._bars.start_task(self._rows[name])

    def show(self, name: str, served: int) -> None:
        self._bars.update(self._rows[name], completed=served, refresh=True)


class _Lines:
    def __init__(self, buyers: int) -> None:
        self._buyers = buyers
        self._last_line = 0.0

    def begin(self, name: str) -> None:
        self._last_line = time.monotonic()
        print(f"{name}: the sale begins", flush=True)

    def show(self, name: str, served: int) -> None:
        is_due = time.monotonic() - self._last_line >= LINE_EVERY
        if is_due or served == self._buyers:
            self._last_line = time.monotonic()
            print(f"{name}: {served} of {self._buyers} served", flush=True)
