"""``docs/endings.md``, from the table that the tests go by.

``python tests/support/endings_page.py > docs/endings.md`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import Version

from endings import POOLS, SECTIONS, Ending, Outcome

INTRODUCTION = """\
# Every ending of a run, and what becomes of its lock

For every way in which Celery lets a run end, on every pool: **when the lock is free**, what becomes
of the message, and the state of the result. Each such cell was played with a real worker and a real
Redis ({count} of them, on Celery 5.4, 5.5, 5.6 and 5.7), while the lock was looked at every few
milliseconds: it was the run's for as long as the body lived, and no two bodies overlapped.

- **at once**: before the next run could start.
- **noticed**: the worker's main process sees a child that was killed at once or after up to 5 s;
  then the lock is free, before the message goes back to the queue.
- **process gone**: after a hard time limit the body may go on until its process is killed.
- **one ttl**: nobody is left who could give it back.
- PENDING at the end: Celery stores no outcome.
- lost: so it is with a plain task too.
- An empty cell: this pool has no child processes, no such time limit, cannot end a single run, or
  (solo) hears nothing while a body runs.

`lock_at_least_for` and `lock_on_retry="hold"` keep a lock on purpose after any ending but a crash.
On RabbitMQ a message whose worker was killed is delivered again within milliseconds, on Redis after
the visibility timeout. It meets the lock of the dead, goes back to the queue, and runs when the ttl
is over.

This page is written by `python tests/support/endings_page.py > docs/endings.md`, from the table
that the tests go by.
"""


def page() -> str:
    """The whole page."""
    count = sum(
        any(isinstance(fate, Outcome) for _, fate in _versions(ending.outcomes[pool]))
        for endings in SECTIONS.values()
        for ending in endings
        for pool in POOLS
    )
    return "\n".join([INTRODUCTION.format(count=count), *_tables()])


def _tables() -> Iterator[str]:
    for title, endings in SECTIONS.items():
        yield f"## {title}\n"
        yield "| what ends the run | " + " | ".join(POOLS) + " |"
        yield "|---" * (len(POOLS) + 1) + "|"
        for ending in endings:
            yield "| " + " | ".join(_row(ending)) + " |"
        yield ""


def _row(ending: Ending) -> Iterator[str]:
    yield ending.name + (f" (since Celery {ending.since})" if ending.since != "5.4" else "")
    cells = [_cell(ending.outcomes[pool], ending.since) for pool in POOLS]
    yield cells[0]
    for cell in cells[1:]:
        yield "as prefork" if cell and cell == cells[0] else cell


def _cell(fates: Any, since: str) -> str:
    return _by_version([(v, _fate(fate)) for v, fate in _versions(fates)], since)


def _fate(fate: Any) -> str:
    if not isinstance(fate, Outcome):
        return ""
    return f"**{fate.free.text}** · {fate.message.text} · {_state(fate.state)}"


def _state(state: Any) -> str:
    return _by_version(_versions(state))


def _by_version(texts: list[tuple[str, str]], since: str = "5.4") -> str:
    """The newest Celery's, then in parentheses what was different before it."""
    (version, text), *older = texts
    for next_version, next_text in older:
        if Version(version) > Version(since):
            text += f" (before {version}: {next_text or 'cannot happen'})"
        version = next_version
    return text


def _versions(value: Any) -> list[tuple[str, Any]]:
    """The newest first."""
    if not isinstance(value, Mapping):
        return [("", value)]
    return sorted(value.items(), key=lambda item: Version(item[0]), reverse=True)


if __name__ == "__main__":
    print(page(), end="")
