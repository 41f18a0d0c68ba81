"""Every place where a duplicate can stand, and what its callers see under each conflict policy.

One table, for the tests (``tests/worker/test_every_conflict.py``) and for the documentation
(``conflicts_page.py``).
"""

from __future__ import annotations

import ast
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from packaging.version import Version

from endings import CELERY, of_this_celery


class End(NamedTuple):
    """What the callers of one part of a canvas see.

    Attributes:
        state: The state of its result; or several, with "or" in between.
        answer: What ``.get()`` returns, or the name of the error that it raises, likewise.
    """

    state: str
    answer: str | None = None

    def allows(self, seen: End) -> bool:
        """Whether it may be seen so."""
        state, answer = self
        return seen.state in state.split(" or ") and (
            seen.answer in answer.split(" or ") if answer else seen.answer is None
        )


SKIPPED = End("REVOKED", "DuplicateTaskError")
FAILED = End("FAILURE", "LockHeldError")
IN_CHORD_ERROR = End("FAILURE", "ChordError")
#: Its result is ignored: there is nothing to wait for.
NOT_STORED = End("PENDING")


class Outcome(NamedTuple):
    """What is to become of a canvas in which a duplicate stands.

    Attributes:
        ends: By part.
        bodies: How often the body of each part has run; left out if never.
        errbacks: How often the errback of each part has run; left out if never.
    """

    ends: Mapping[str, End]
    bodies: Mapping[str, int]
    errbacks: Mapping[str, int]


@dataclass(frozen=True)
class Policy:
    """One conflict policy.

    Attributes:
        name: What ``on_conflict`` says.
        end: How the duplicate ends, at once; ``None``: it runs, when the lock is free.
        did: What the worker logs of it.
    """

    name: str
    end: End | None
    did: str


SKIP = Policy("skip", SKIPPED, "skipped")
FAIL = Policy("fail", FAILED, "failed")
REQUEUE = Policy("requeue", None, "goes back to the queue")
WAIT = Policy("wait", None, "stands in line")
POLICIES = [SKIP, FAIL, REQUEUE, WAIT]
#: By how the holder ends, which is the same call here: it shares its value, or its error, or
#: leaves none.
JOIN = Policy("join", None, "waits in the queue for the outcome of the same call")
JOIN_ERROR = replace(JOIN, end=End("FAILURE", "KeyError"))


class HoldersEnd(NamedTuple):
    """How the run ends that has the lock.

    Attributes:
        name: For people.
        make: Makes it happen; is given its process, and what lets its body go on.
        is_failure: Whether its body then raises.
        free: When the lock is free, for people.
    """

    name: str
    make: Callable[[int, Callable[[], None]], None]
    is_failure: bool
    free: str


def let_it_end(pid: int, open_gate: Callable[[], None]) -> None:
    """It returns, or raises."""
    open_gate()


def kill_it(pid: int, open_gate: Callable[[], None]) -> None:
    """As the kernel does when memory is short."""
    os.kill(pid, signal.SIGKILL)


HOLDERS_ENDS = [
    HoldersEnd("succeeds", let_it_end, False, "at once"),
    HoldersEnd("fails", let_it_end, True, "at once"),
    HoldersEnd("is killed", kill_it, False, "when Celery has noticed, within 5 s"),
]


@dataclass(frozen=True)
class Place:
    """Where a duplicate stands.

    Attributes:
        name: For people.
        canvas: In Python. Parts that begin with ``duplicate`` meet the lock, ``failing`` raises,
            an ``errback`` only counts; all others run through.
        with_it: The parts that end as the duplicate does, where it does not run.
        in_chord_error: The parts that then end in ``ChordError``.
        in_its_error: The parts that then fail with the duplicate's error.
        errback_of: The part whose errback then runs; the duplicate's own only if it fails.
        is_ignored: Whether the duplicate's result is.
        is_tracked: Whether the duplicate's start is stored.
        steady_since: The first Celery in which such a canvas of plain tasks always ends.
    """

    name: str
    canvas: str
    with_it: Sequence[str] = ()
    in_chord_error: Sequence[str] = ()
    in_its_error: Sequence[str] = ()
    errback_of: str = ""
    is_ignored: bool = False
    is_tracked: bool = False
    steady_since: str = "5.4"

    @property
    def parts(self) -> list[str]:
        """In the order in which they are written."""
        names = [node for node in ast.walk(ast.parse(self.canvas)) if isinstance(node, ast.Name)]
        names.sort(key=lambda name: name.col_offset)
        known = ("chain", "chord", "group", "errback")
        return [name.id for name in names if name.id not in known]

    @property
    def duplicates(self) -> list[str]:
        """One, or several."""
        return [part for part in self.parts if part.startswith("duplicate")]

    @property
    def unharmed(self) -> list[str]:
        """The parts that run whatever becomes of the duplicate."""
        others = (*self.duplicates, *self.with_it, *self.in_chord_error, *self.in_its_error)
        return [part for part in self.parts if part not in others]

    @property
    def is_steady(self) -> bool:
        """Whether the Celery that is installed always brings such a canvas to its end."""
        return Version(self.steady_since) <= CELERY

    def joined_outcome(self, holders_end: HoldersEnd) -> Outcome:
        """What is to become of it if its duplicates join a holder that ends so.

        If that one leaves no outcome, one of them runs; they are not told apart.
        """
        if holders_end.is_failure:
            return self.outcome(JOIN_ERROR)
        ends, bodies, errbacks = self.outcome(JOIN)
        shared = {part: End("SUCCESS", "duplicate") for part in self.duplicates}
        ends = {part: shared.get(part, end) for part, end in ends.items()}
        if self.is_ignored:
            ends["duplicate"] = NOT_STORED
        bodies = Counter(part for part in bodies if part not in shared)
        if holders_end.make is kill_it:
            bodies["duplicate"] = 1
        return Outcome(ends, bodies, errbacks)

    def outcome(self, policy: Policy) -> Outcome:
        """What is to become of it, on the Celery that is installed."""
        ends = {part: End("SUCCESS", part) for part in self.parts}
        bodies: Counter[str] = Counter(self.parts)
        errbacks: Counter[str] = Counter()
        if "failing" in ends:
            ends["failing"] = End("FAILURE", "KeyError")
        if policy.end:
            ends |= dict.fromkeys([*self.duplicates, *self.with_it], policy.end)
            ends |= dict.fromkeys(self.in_chord_error, IN_CHORD_ERROR)
            ends |= dict.fromkeys(self.in_its_error, of_this_celery(IN_ITS_ERROR[policy.name]))
            bodies = Counter(self.unharmed)
            if self.errback_of and (self.errback_of != "duplicate" or policy is not SKIP):
                errbacks = Counter([self.errback_of])
        if self.is_ignored:
            ends["duplicate"] = of_this_celery(IGNORED[policy.name])
        return Outcome(ends, bodies, errbacks)


#: Celery 5.6 fails the members of a body that is a group, and revokes them as well.
IN_ITS_ERROR: Mapping[str, Mapping[str, End]] = {
    name: {
        "5.4": End("FAILURE", error),
        "5.6": End("FAILURE or REVOKED", f"{error} or TaskRevokedError"),
        "5.7": End("FAILURE", error),
    }
    for name, error in {
        "skip": "DuplicateTaskError",
        "fail": "LockHeldError",
        "join": "KeyError",
    }.items()
}
#: Before 5.6 Celery stores an error although the caller asked for no result.
IGNORED: Mapping[str, Any] = {
    "skip": NOT_STORED,
    "fail": {"5.4": FAILED, "5.6": NOT_STORED},
    "requeue": NOT_STORED,
    "wait": NOT_STORED,
    "join": {"5.4": End("FAILURE", "KeyError"), "5.6": NOT_STORED},
}

# --- the table ----------------------------------------------------------------------------------

ALONE: Sequence[Place] = [
    Place("alone", "duplicate"),
    Place("its result ignored", "duplicate.set(ignore_result=True)", is_ignored=True),
    Place("its start stored (`task_track_started`)", "duplicate", is_tracked=True),
    Place(
        "with a link and an errback",
        "duplicate.set(link=[after], link_error=[errback])",
        with_it=["after"],
        errback_of="duplicate",
    ),
    Place("as a link", "first.set(link=[duplicate])"),
    Place("as an errback", "failing.set(link_error=[duplicate])"),
]

CHORDS: Sequence[Place] = [
    Place("in a group", "group(duplicate, other)"),
    Place(
        "in the header of a chord",
        "chord([duplicate, other], body.on_error(errback))",
        in_chord_error=["body"],
        errback_of="body",
    ),
    Place(
        "in the header of a chord, with an errback of its own",
        "chord([duplicate.on_error(errback), other], body)",
        in_chord_error=["body"],
        errback_of="duplicate",
    ),
    Place(
        "in the header of a chord, twice",
        "chord([duplicate, duplicate_too], body.on_error(errback))",
        in_chord_error=["body"],
        errback_of="body",
    ),
    Place(
        "in the header of a chord, its result ignored",
        "chord([duplicate.set(ignore_result=True), other], body)",
        in_chord_error=["body"],
        is_ignored=True,
    ),
    Place(
        "in the header of a chord whose body is a group",
        "chord([duplicate, other], group(one, two))",
        in_its_error=["one", "two"],
    ),
    Place(
        "in the header of a chord whose body is a group of chains",
        "chord([duplicate, other], group(chain(one, two), three))",
        in_its_error=["one", "two", "three"],
    ),
    Place(
        "as the body of a chord",
        "chord([one, two], duplicate.on_error(errback))",
        errback_of="duplicate",
    ),
]

CHAINS: Sequence[Place] = [
    Place("at the head of a chain", "chain(duplicate, last)", with_it=["last"]),
    Place("in the middle of a chain", "chain(first, duplicate, last)", with_it=["last"]),
    Place("at the tail of a chain", "chain(first, duplicate)"),
    Place(
        "in the middle of a chain with an errback",
        "chain(first, duplicate, third, last).on_error(errback)",
        with_it=["third", "last"],
        errback_of="duplicate",
    ),
    Place(
        "in the middle of a chain, its result ignored",
        "chain(first, duplicate.set(ignore_result=True), last)",
        with_it=["last"],
        is_ignored=True,
    ),
    Place(
        "before a step with a link",
        "chain(duplicate, last.set(link=[after]))",
        with_it=["last", "after"],
    ),
    Place("before a group", "chain(duplicate, group(one, two))", with_it=["one", "two"]),
    Place(
        "before a group that is not the last step",
        "chain(duplicate, group(one, two), last)",
        with_it=["one", "two", "last"],
    ),
    Place(
        "before a chord",
        "chain(duplicate, chord([one, two], body))",
        with_it=["one", "two", "body"],
    ),
    Place(
        "before a chord with an errback",
        "chain(duplicate, chord([one, two], body.on_error(errback)))",
        with_it=["one", "two", "body"],
    ),
    Place(
        "before a chord that is not the last step",
        "chain(duplicate, chord([one, two], body), last)",
        with_it=["one", "two", "body", "last"],
    ),
    Place(
        "in a group that a step follows",
        "chain(group(duplicate, other), last)",
        in_chord_error=["last"],
    ),
    Place(
        "in the header of a chord that a step follows",
        "chain(chord([duplicate, other], body), last)",
        in_chord_error=["body", "last"],
    ),
    Place(
        "as the body of a chord that a step follows",
        "chain(chord([one, two], duplicate), last)",
        with_it=["last"],
    ),
]

NESTED: Sequence[Place] = [
    Place("in a chain in a group", "group(chain(duplicate, last), other)", with_it=["last"]),
    Place(
        "in a chain in the header of a chord",
        "chord([chain(first, duplicate, last), other], body.on_error(errback))",
        with_it=["last"],
        in_chord_error=["body"],
        errback_of="body",
    ),
    Place(
        "before a group in the header of a chord",
        "chord([chain(duplicate, group(one, two)), other], body.on_error(errback))",
        with_it=["one", "two"],
        in_chord_error=["body"],
        errback_of="body",
        steady_since="5.7",
    ),
    Place(
        "before a chord in the header of a chord",
        "chord([chain(duplicate, chord([one, two], inner)), other], body.on_error(errback))",
        with_it=["one", "two", "inner"],
        in_chord_error=["body"],
        errback_of="body",
    ),
    Place(
        "in a group in the header of a chord",
        "chord([group(duplicate, other), third], body.on_error(errback))",
        in_chord_error=["body"],
        errback_of="body",
    ),
    Place(
        "in a chord in the header of a chord",
        "chord([chord([duplicate, other], inner), third], body.on_error(errback))",
        in_chord_error=["inner", "body"],
        errback_of="body",
    ),
    Place(
        "in a chord in the header of a chord, three times",
        "chord([chord([duplicate, duplicate_2, duplicate_3], inner), z], body.on_error(errback))",
        in_chord_error=["inner", "body"],
        errback_of="body",
    ),
    Place(
        "in a chain in the header of a chord that a step follows",
        "chain(chord([chain(duplicate, last), other], body), end)",
        with_it=["last"],
        in_chord_error=["body", "end"],
    ),
    Place(
        "in a chain that is a link", "first.set(link=[chain(duplicate, last)])", with_it=["last"]
    ),
    Place(
        "before a chord that is a link",
        "duplicate.set(link=[chord([one, two], body)])",
        with_it=["one", "two", "body"],
    ),
]

SECTIONS: Mapping[str, Sequence[Place]] = {
    "By itself": ALONE,
    "In groups and chords": CHORDS,
    "In chains": CHAINS,
    "In one within the other": NESTED,
}
PLACES = [place for places in SECTIONS.values() for place in places]
