"""What beat fired and what became of it, while it happens and in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .history import Outcome

#: Seconds between two lines where there is no terminal.
LINE_EVERY = 2.0


class Display:
    """The table of the running part: alive on a terminal, lines now and then anywhere else."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._last_line = time.monotonic()
        # Drawn when there is news, without a thread: processes are started while it is shown.
        self._live = Live(console=console, auto_refresh=False)

    def show(self, outcomes: Sequence[Outcome]) -> None:
        """What came of it by now."""
        if self._console.is_terminal:
            self._live.update(outcome_table(self._title, outcomes), refresh=True)
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._last_line = time.monotonic()
            print("\n".join(map(_in_words, outcomes)), flush=True)

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        else:
            print(self._title, flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()


def outcome_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """One row per way; more than one at once is red."""
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in ("fired", "waiting", "ran", "skipped", "expired", "most\nat once"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        most = outcome.most_at_once
        table.add_row(
            *(outcome.way.title, str(len(outcome.fired)), str(outcome.waiting)),
            *(str(len(outcome.bodies)), str(outcome.skipped), str(outcome.expired)),
            f"[bold red]{most}[/]" if most > 1 else f"[green]{most}[/]",
        )
    return table


def _in_words(outcome: Outcome) -> str:
    return (
        f"  {outcome.way.title}: {len(outcome.fired)} fired, {len(outcome.bodies)} ran, "
        f"{outcome.skipped} skipped, {outcome.expired} expired"
    )
