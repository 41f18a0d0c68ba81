"""What this package sends to the broker: runs that go back to the queue."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from .results import ignores_result
from .stores.base import Generation, Place

#: Message header of a run that was put back: what :class:`Waiting` says, as a list. Dropped once
#: the run has its lock, so that a later retry starts afresh.
HEADER = "singleton_waiting"
#: Message header under "rerun": when the call was published, in µs since the epoch. A retry is as
#: new as its first attempt.
GENERATION = "singleton_generation"
#: Message header: the key of what was reserved for the run. Dropped once it has started.
RESERVED = "singleton_reserved"
#: Message property under which the worker's main process tells a child its owner token. Not a
#: header: those go out again with a retry.
OWNER_TOKEN = "singleton_owner_token"


@dataclass(frozen=True)
class Waiting:
    """How long a run has gone without its lock.

    Attributes:
        since: Its first conflict, in seconds since the epoch by the clock of the worker that
            met it; ``None`` before the first.
        requeues: How often it has been put back.
        is_redelivered: Whether the broker delivered the message not for the first time; of one
            that was put back, whether it did so before. The broker itself forgets that.
        away_since: Since when the store is away, likewise; ``None`` while it answers.
        place: The number of its place in line; 0 if it has none.
        served: The line's count of those who were let in, as of when it first stood there.
        joined: The task id of the run whose outcome it waits for; empty if it waits for none.
        free_for: Seconds that it has waited for that outcome although the lock was free.
    """

    since: float | None = None
    requeues: int = 0
    is_redelivered: bool = False
    away_since: float | None = None
    place: int = 0
    served: int = 0
    joined: str = ""
    free_for: float = 0.0

    @classmethod
    def of(cls, request: Any) -> Waiting:
        """As the message of the current run tells it."""
        # A newer release may tell more.
        told = cls(*((request.headers or {}).get(HEADER) or ())[: len(fields(cls))])
        is_redelivered = bool((request.delivery_info or {}).get("redelivered"))
        return replace(told, is_redelivered=told.is_redelivered or is_redelivered)

    def is_promised(self, request: Any) -> bool:
        """Whether the run was let in before: its caller was promised an outcome (R5)."""
        return bool(request.retries or self.is_redelivered or self.requeues)

    def in_outage(self, asked_at: float) -> Waiting:
        """The same, if the store has not answered what it was asked then."""
        return replace(self, away_since=asked_at) if self.away_since is None else self

    def after_outage(self) -> Waiting:
        """The same, now that the store answers: the time that it was away does not count."""
        if self.away_since is None or self.since is None:
            return replace(self, away_since=None)
        return replace(self, since=self.since + time.time() - self.away_since, away_since=None)

    def at_conflict(self, place: Place | None) -> Waiting:
        """The same, now that the run has met a held lock, and perhaps stands in line for it."""
        since = time.time() if self.since is None else self.since
        if place is None:
            return replace(self, since=since)
        return replace(self, since=since, place=place.number, served=place.served)

    def behind_itself(self) -> Waiting:
        """The same, now that the run has met its own lock: that time does not count."""
        return replace(self, since=None)

    def joining(self, task_id: str) -> Waiting:
        """The same, now that the run waits for the outcome of that one: it needs no place."""
        return replace(self, joined=task_id, free_for=0.0, place=0, served=0)

    def with_lock_free(self, seconds: float) -> Waiting:
        """The same, now that the run is to wait so long for an outcome, with the lock free."""
        return replace(self, free_for=self.free_for + seconds)

    def note_in(self, request: Any) -> None:
        """Have the current run say so."""
        request.headers = {**(request.headers or {}), HEADER: list(astuple(self))}

    def seconds(self) -> float:
        """Since the first conflict; clocks of two workers may differ, but never below 0."""
        return 0.0 if self.since is None else max(0.0, time.time() - self.since)


def put_back(task: Any, countdown: float, waiting: Waiting) -> None:
    """Send the current run to its queue again, due after ``countdown`` seconds.

    Its id, parent, arguments, callbacks, canvas, expiry and retries stay. The caller still
    has to end this delivery with ``Ignore``. Not ``Reject(requeue=True)``: with early
    acknowledgement that loses the message, and on RabbitMQ it starves the queue.
    """
    mark = replace(waiting, requeues=waiting.requeues + 1)
    headers = {**(task.request.headers or {}), HEADER: list(astuple(mark))}
    # Before 5.7 Celery forgets that the caller asked for no result.
    signature = task.signature_from_request(
        countdown=countdown, headers=headers, ignore_result=ignores_result(task)
    )
    request, was_called_directly = task.request, task.request.called_directly
    # Or Celery would take a run that has no parent for its own.
    request.called_directly = True
    try:
        signature.apply_async(add_to_parent=False)
    finally:
        request.called_directly = was_called_directly


def generation_now() -> int:
    """That of a call which is published now, by this machine's clock."""
    return time.time_ns() // 1000


def generation_of(task: Any, request: Any) -> Generation:
    """How new the current run is; by its arrival, if its publisher has not said so."""
    number = (request.headers or {}).get(GENERATION)
    return Generation(task.name, number if isinstance(number, int) else 0)


def note_generation(request: Any, number: int) -> None:
    """Have the current run stay as new as it is: if it is put back, and for its retries."""
    if number:
        request.headers = {**(request.headers or {}), GENERATION: number}


def own_headers(request: Any) -> dict[str, Any]:
    """What the current run has to say in its next message, whatever other headers that has."""
    names = (GENERATION, RESERVED)
    return {name: value for name, value in (request.headers or {}).items() if name in names}


def forget_waiting(request: Any) -> None:
    """Drop the header from the current run: it has its lock."""
    if request.headers:
        request.headers.pop(HEADER, None)
