"""Who was in the critical section, and when: written by the bodies, read and drawn afterwards.

Times are ``time.monotonic()``. On one machine that is one clock for all processes, and it does
not step, so the bodies of different workers can be compared to the microsecond. Across machines
it means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import redis
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALONE, TOGETHER, CROWD = "#1f7a8c", "#d62839", "#fbdfe1"
GOOD, INK, LINE = "#2a7d4f", "#22303c", "#e1e6ea"


class Body(NamedTuple):
    """One run of a task's body.

    Attributes:
        worker: The Celery node name of its worker.
        pid: The pool process that ran it.
        start: When it began, in seconds.
        end: When it had done its last work, in seconds.
    """

    worker: str
    pid: int
    start: float
    end: float


@dataclass(frozen=True)
class Panel:
    """One part of the picture: what one way of running looked like.

    Attributes:
        title: Its name.
        verdict: The figures under the name, for the whole run.
        is_good: Whether the verdict is one to be proud of; decides its colour.
        bodies: All bodies of the run.
        rows: The pool processes that could have run them, as (worker, pid).
        begin: Where the panel begins, by the bodies' clock.
        fired: When messages were sent, marked below the rows; may be empty.
    """

    title: str
    verdict: str
    is_good: bool
    bodies: Sequence[Body]
    rows: Sequence[tuple[str, int]]
    begin: float
    fired: Sequence[float] = ()


def write_body(client: redis.Redis, key: str, worker: str, start: float) -> None:
    """Note that a body which began at ``start`` in this process has done its work."""
    client.rpush(key, json.dumps(Body(worker, os.getpid(), start, time.monotonic())))


def read_bodies(client: redis.Redis, key: str) -> list[Body]:
    """All bodies noted under ``key``, in the order of their starts."""
    bodies = [Body(*json.loads(line)) for line in client.lrange(key, 0, -1)]
    return sorted(bodies, key=lambda body: body.start)


def overlaps(bodies: Iterable[Body]) -> int:
    """How many of the bodies started before an earlier one had ended."""
    count, last_end = 0, float("-inf")
    for body in sorted(bodies, key=lambda body: body.start):
        count += body.start < last_end
        last_end = max(last_end, body.end)
    return count


def most_at_once(bodies: Iterable[Body]) -> int:
    """The largest number of bodies that were running at the same moment."""
    return max((running for _, _, running in _stretches(bodies)), default=0)


def rows(bodies: Iterable[Body]) -> list[tuple[str, int]]:
    """The pool processes that ran the bodies, as (worker, pid)."""
    return sorted({(body.worker, body.pid) for body in bodies})


def picture_folder(text: str) -> Path:
    """A command's ``--output``: a folder that is there, or can be made, for the picture.

    Raises:
        ArgumentTypeError: It cannot be written to.
    """
    folder = Path(text)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} is no folder that can be written to")
    return folder


def draw(path: Path, title: str, panels: Sequence[Panel], seconds: float, unit: str = "s") -> None:
    """Write the timeline as a PNG: panels side by side, one row per pool process.

    Where two bodies or more run at once, they are red, and the time is shaded red.

    Args:
        path: The file.
        title: Of the whole picture.
        panels: The ways to compare.
        seconds: How much of each run is shown.
        unit: What the axes count: ``"s"`` or ``"ms"``.
    """
    # Here, and not above: the workers import this module too, and never draw.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    row_count = max(len(panel.rows) for panel in panels)
    height = 2.3 + 0.3 * row_count
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1)
    figure = Figure(figsize=(4.3 * len(panels), height), dpi=180, layout=layout)
    figure.suptitle(title, fontsize=14, color=INK)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        scale = 1000 if unit == "ms" else 1
        _draw_bodies(axis, panel, seconds, scale)
        if panel.fired:  # a line without points upsets the layout
            _draw_fired(axis, panel, row_count, scale)
        axis.set_xlim(0, seconds * scale)
        _dress(axis, panel, row_count, unit)
    for axis, panel in list(zip(axes, panels, strict=True))[1:]:
        if panel.rows == panels[0].rows:
            axis.set_yticklabels([])  # the same processes as in the first panel
    _add_legend(figure, any(panel.fired for panel in panels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_bodies(axis: Axes, panel: Panel, seconds: float, scale: float) -> None:
    begin, end = panel.begin, panel.begin + seconds
    shown = [body for body in panel.bodies if body.end > begin and body.start < end]
    crowds = [(start, end) for start, end, running in _stretches(shown) if running > 1]
    for start, stop in crowds:
        axis.axvspan((start - begin) * scale, (stop - begin) * scale, color=CROWD, lw=0)
    for body in shown:
        is_alone = not any(start < body.end and body.start < stop for start, stop in crowds)
        axis.broken_barh(
            [((body.start - begin) * scale, (body.end - body.start) * scale)],
            (panel.rows.index((body.worker, body.pid)) - 0.36, 0.72),
            facecolor=ALONE if is_alone else TOGETHER,
            edgecolor="white",  # keeps bodies apart that follow each other
            lw=0.6,
        )


def _draw_fired(axis: Axes, panel: Panel, row: float, scale: float) -> None:
    times = [(time - panel.begin) * scale for time in panel.fired]
    axis.plot(times, [row - 0.2] * len(times), "^", color=INK, ms=5, ls="none", clip_on=False)


def _dress(axis: Axes, panel: Panel, row_count: int, unit: str) -> None:
    axis.set_title(panel.title, fontsize=13, color=INK, fontweight="bold", pad=24)
    axis.annotate(
        panel.verdict,
        (0.5, 1),
        xytext=(0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        fontsize=11,
        color=GOOD if panel.is_good else TOGETHER,
    )
    axis.set_yticks(range(len(panel.rows)), _labels(panel.rows))
    axis.set_ylim(row_count - (0 if panel.fired else 0.4), -0.6)
    axis.set_xlabel(unit, color=INK)
    axis.tick_params(length=0, labelsize=9, labelcolor=INK)
    axis.grid(axis="x", color=LINE, lw=0.8)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_color(LINE)


def _labels(rows: Sequence[tuple[str, int]]) -> list[str]:
    if len({worker for worker, _ in rows}) == 1:
        return [f"pid {pid}" for _, pid in rows]
    return [f"{worker.partition('@')[0]} · pid {pid}" for worker, pid in rows]


def _add_legend(figure: Figure, is_fired_shown: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = [
        Patch(color=ALONE, label="a body, alone"),
        Patch(color=TOGETHER, label="bodies that overlap"),
        Patch(color=CROWD, label="two or more at once"),
    ]
    if is_fired_shown:
        entries.append(Line2D([], [], marker="^", color=INK, ms=5, ls="none", label="beat fires"))
    figure.legend(
        handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=10
    )


def _stretches(bodies: Iterable[Body]) -> Iterator[tuple[float, float, int]]:
    """(start, end, how many bodies were running), for each time between two changes."""
    # At the same moment ends sort before starts: bodies that touch do not overlap.
    changes = sorted(change for body in bodies for change in ((body.start, 1), (body.end, -1)))
    running = 0
    for (time_, change), (next_time, _) in pairwise(changes):
        running += change
        yield time_, next_time, running
