"""``docs/conflicts.md``, from the table that the tests go by.

``python tests/support/conflicts_page.py > docs/conflicts.md`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from conflicts import FAIL, HOLDERS_ENDS, PLACES, SECTIONS, SKIP, Place

INTRODUCTION = """\
# Every place where a duplicate can stand, and what its callers see

A duplicate that meets a held lock can stand anywhere in a canvas. Nobody waits for ever, whichever
result is asked for: that of the whole, of one step, or one that is known by its id alone. Each of
these {count} places was played under each policy, said by its name and (but for `join`) by a
callable, with a real worker and a real Redis, on Celery 5.4, 5.5, 5.6 and 5.7, with a holder that
succeeds, fails, or is killed. No body and no errback ran twice.

| policy | the duplicate's state | `.get()` | when |
|---|---|---|---|
| `skip` | {skip.state} | raises `{skip.answer}` | at once, while the holder runs on |
| `fail` | {fail.state} | raises `{fail.answer}` | at once, while the holder runs on |
| `requeue`, `wait` | that of its own run | as that run ends | after its turn: see below |
| `join` | the holder's | as the holder ends | within 5 s after that: see below |

Under **`requeue` and `wait`** every part of every canvas here ends as if there had been no
conflict: all bodies run once, in their order, with their values. The lock is free for the duplicate
when the holder has ended:

| the holder | the lock is free |
|---|---|
{holders}

Under **`join`**, with a holder that is the same call, every part ends as if the duplicates had run
with the holder's outcome, and their bodies do not run:

| the holder | the duplicates |
|---|---|
| succeeds | SUCCESS with its value, and all goes on with that |
| fails | FAILURE with its error; for the rest, read the tables as under `fail`, with that error |
| is killed | one of them runs, the others have the outcome of that one |

Under **`skip` and `fail`** the tables say what becomes of the rest:

- **ends with it**: the same state and the same error as the duplicate has, at once.
- **ChordError**: fails with that, at once if the other members of the header have ended.
- **runs**: as if nothing had been.
- **errbacks**: run once; that of the duplicate itself under `fail` only: a skip is no failure.

This page is written by `python tests/support/conflicts_page.py > docs/conflicts.md`, from the table
that the tests go by.
"""


def page() -> str:
    """The whole page."""
    introduction = INTRODUCTION.format(
        count=len(PLACES),
        skip=SKIP.end,
        fail=FAIL.end,
        holders="\n".join(f"| {each.name} | {each.free} |" for each in HOLDERS_ENDS),
    )
    return "\n".join([introduction, *_tables()])


def _tables() -> Iterator[str]:
    for title, places in SECTIONS.items():
        yield f"## {title}\n"
        yield "| where it stands | ends with it | ChordError | runs | errbacks |"
        yield "|---|---|---|---|---|"
        for place in places:
            yield "| " + " | ".join(_row(place)) + " |"
        yield ""


def _row(place: Place) -> Iterator[str]:
    yield f"{place.name}: `{place.canvas}`" + _remark(place)
    with_it = _code(place.with_it)
    if place.in_its_error:
        with_it = f"{_code(place.in_its_error)}, as failed (Celery 5.6: or revoked)"
    yield with_it
    yield _code(place.in_chord_error)
    yield _code(place.unharmed)
    yield _errback(place)


def _remark(place: Place) -> str:
    if place.is_ignored:
        return " (its own outcome is not stored; before Celery 5.6 `fail` stores it)"
    if place.steady_since != "5.4":
        return f" (before Celery {place.steady_since} such a canvas may hang if nothing is skipped)"
    return ""


def _errback(place: Place) -> str:
    if place.errback_of == "duplicate":
        return "the duplicate's, under `fail`"
    return f"`{place.errback_of}`'s" if place.errback_of else ""


def _code(parts: Iterable[str]) -> str:
    return ", ".join(f"`{part}`" for part in parts)


if __name__ == "__main__":
    print(page(), end="")
