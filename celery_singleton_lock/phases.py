"""Publish-time phases: what is taken when a run is published, and what becomes of it.

A reservation belongs to a task id, and tells a digest of the call's arguments. Its key travels in
the message: during a deploy the worker may derive another one from the same call.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from traceback import walk_tb
from typing import Any, NamedTuple, cast

from celery import current_task, uuid
from celery.exceptions import Retry
from celery.utils.time import maybe_iso8601, maybe_make_aware

from .errors import Holder, LockHeldError, StoreError
from .keys import queued_key
from .locks import AppLocks
from .options import LONGEST, LockOptions
from .publishing import RESERVED
from .results import SingletonResult, is_finished
from .stores.base import Claimant, Reservation, Reserved

logger = logging.getLogger(__name__)

#: Seconds that a publish waits for a run whose result is stored already to give back its lock.
LEAVING_FOR = 0.2
LOOK_EVERY = 0.01

#: Functions of kombu, py-amqp and redis-py in which nothing has been sent yet.
_CONNECTING = {
    "establish_connection",
    "get_connection",  # sees whether one that was left open is still good
    "connect",
    "connect_check_health",
    "_connect",
}

#: What a message says that somebody waits for: if it were not published, they would for ever.
_AWAITED = ("chain", "chord", "group_id", "group_index")


class Call(NamedTuple):
    """One call, as it is to be published.

    Attributes:
        options: Of its task.
        key: Its lock key, without the app's prefix.
        args: Its positional arguments, as they are sent.
        kwargs: Its keyword arguments, likewise.
    """

    options: LockOptions
    key: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, options: LockOptions, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call, checked.

        Raises:
            KeyDerivationError: An argument has no lock key.
            TypeError: The arguments do not fit the task.
        """
        return cls(options, options.key("", args, kwargs), args, kwargs)

    @property
    def is_to_be_reserved(self) -> bool:
        """Whether its phase begins at the publish."""
        return self.options.lock_phase != "running"

    def claimant(self, task_id: str) -> Claimant:
        """What its publisher says of it."""
        digest = self.options.call(self.args, self.kwargs)
        return Claimant(task_id, socket.gethostname(), os.getpid(), digest)


def is_settled_at_start(app: Any, message: Mapping[str, Any]) -> bool:
    """Whether a call is published whatever is reserved, and meets the lock when it starts.

    Left out, a member of a canvas would hang it, and links would be lost; and a caller that names
    the task id wants that one.

    Args:
        app: The app.
        message: The options of ``apply_async``, ``task_id``, ``link`` and ``link_error`` included.
    """
    is_awaited = any(message.get(name) is not None for name in _AWAITED)
    is_named = message.get("task_id") or message.get("link") or message.get("link_error")
    return bool(is_awaited or is_named or app.conf.task_always_eager)


def publish(task: Any, call: Call, message: Mapping[str, Any], send: Callable[..., Any]) -> Any:
    """Publish a call, unless a run that is under way will do for it.

    Args:
        task: The task.
        call: The call; its phase begins here.
        message: The options of ``apply_async``.
        send: Publishes the call, given a ``task_id`` and ``headers``.

    Returns:
        The result of the new run; or the first's, with ``is_duplicate`` and ``holder``.

    Raises:
        LockHeldError: It is a duplicate, and the policy is "fail".
    """
    locks, options = AppLocks.of(task.app), call.options
    if not locks.store.is_shared_between_processes:
        return send()  # a worker elsewhere would never give it back
    key = reserved_key(options, locks.address.key_prefix + call.key)
    claimant = call.claimant(uuid())
    headers = {**(message.get("headers") or {}), RESERVED: key}
    try:
        reservation = _reserve(task, locks, key, call, claimant, _life(task, options, message))
    except StoreError as error:
        # Nothing is lost: it meets the lock when it starts. It may have been reserved, too.
        locks.note_absence(error, key, "calls are published whatever is reserved")
        return send(task_id=claimant.task_id, headers=headers)
    except BaseException:
        _cancel(locks, key, claimant.task_id)  # interrupted; nothing is published
        raise
    locks.note_presence()
    if reservation is None:
        return send()
    if not reservation.is_reserved:
        return _first_result(task, options, reservation.holder)
    handled_by_caller = sys.exc_info()[1]
    try:
        return send(task_id=claimant.task_id, headers=headers)
    except BaseException as error:
        if _may_be_published(task.app, error, handled_by_caller):
            _doubt(task, locks, key, claimant, message)
        else:
            _cancel(locks, key, claimant.task_id)
        raise


def reserved_key(options: LockOptions, lock_key: str) -> str:
    """What is reserved for a call: its lock, or a place before it."""
    return queued_key(lock_key) if options.lock_phase == "queued_and_running" else lock_key


def reserved_beside(options: LockOptions, request: Any, lock_key: str) -> Reserved | None:
    """What the current run gives back with taking its lock; ``None`` if that is the lock itself."""
    key = (request.headers or {}).get(RESERVED)
    if key is None or key != queued_key(lock_key):
        return None
    return Reserved(key, options.lock_reservation_ttl)


def has_started(locks: AppLocks, request: Any, lock_key: str) -> None:
    """The current run has its lock: what was reserved is used up."""
    key = (request.headers or {}).pop(RESERVED, None)
    if key is not None and key not in (lock_key, queued_key(lock_key)):
        _cancel(locks, key, request.id)  # it was published by another release of the code


def has_ended(task: Any) -> None:
    """The current run has ended for good; if it has never started, nobody else will come."""
    cancel(task.app, task.request.headers or {}, task.request.id)
    (task.request.headers or {}).pop(RESERVED, None)


@contextmanager
def coming_again(task: Any, call: Call, held_key: str, seconds: float) -> Iterator[None]:
    """Reserve for the current run while it is published once more, due after so many seconds.

    What is reserved for ``"lifetime"`` is the lock that it holds; it has to be promised to it.
    """
    request, locks, options = task.request, AppLocks.of(task.app), call.options
    key, headers = reserved_key(options, locks.address.key_prefix + call.key), request.headers
    is_beside = key != held_key
    if is_beside:
        try:
            locks.store.reserve(
                key, call.claimant(request.id), seconds + options.lock_reservation_ttl
            )
        except StoreError as error:
            logger.warning("%s; nothing is reserved for a retry", error)
    request.headers = {**(headers or {}), RESERVED: key}
    try:
        yield
    except Retry:
        raise
    except BaseException:
        if is_beside:
            _cancel(locks, key, request.id)
        raise
    finally:
        request.headers = headers  # this run goes on, or ends, without


def cancel(app: Any, headers: Mapping[str, Any], task_id: str, at_least_for: float = 0.0) -> None:
    """Give back what was reserved for a message that nobody will run."""
    key = headers.get(RESERVED)
    if key:
        _cancel(AppLocks.of(app), key, task_id, at_least_for)


def seconds_until(app: Any, eta: Any, countdown: Any) -> float:
    """How far away the eta of a message is, as Celery reads it."""
    if countdown is not None:
        return max(0.0, float(countdown))
    return _seconds_to(app, eta) if eta is not None else 0.0


def _seconds_to(app: Any, moment: Any) -> float:
    if not isinstance(moment, datetime):
        moment = maybe_iso8601(moment)
    moment = maybe_make_aware(moment, app.timezone)
    return max(0.0, float((moment - datetime.now(timezone.utc)).total_seconds()))


def _life(task: Any, options: LockOptions, message: Mapping[str, Any]) -> float:
    """Seconds that a reservation lives if its message is lost."""
    app = task.app
    seconds = seconds_until(app, message.get("eta"), message.get("countdown"))
    seconds += options.lock_reservation_ttl
    expires = message.get("expires", task.expires)
    if expires is not None:
        is_number = isinstance(expires, (int, float))
        # A message that expires is not run later than that.
        seconds = min(seconds, float(expires) if is_number else _seconds_to(app, expires))
    return min(seconds, LONGEST)


def _reserve(
    task: Any, locks: AppLocks, key: str, call: Call, claimant: Claimant, seconds: float
) -> Reservation | None:
    """Reserve; ``None`` if that cannot be, and whose it is will not do for the call.

    For it is held by hand, and there is no result; or by another call, and every call counts; or
    by the run that publishes its own successor here. Or its result is stored, so that it ends any
    moment, and the caller may know that (R5).
    """
    give_up_at = time.monotonic() + LEAVING_FOR
    while True:
        reservation = locks.store.reserve(key, claimant, seconds)
        holder = reservation.holder
        if reservation.is_reserved:
            return reservation
        is_covered = reservation.is_same_call or call.options.on_conflict in ("skip", "fail")
        is_own = bool(current_task) and current_task.request.id == holder.task_id
        if not holder.task_id or not is_covered or is_own:
            return None
        if not reservation.is_running or not is_finished(task, holder.task_id):
            return reservation
        if time.monotonic() >= give_up_at:
            return None
        time.sleep(LOOK_EVERY)


def _first_result(task: Any, options: LockOptions, holder: Holder) -> SingletonResult:
    if options.on_conflict == "fail":
        raise LockHeldError(f"{task.name} is not published: its lock is held by {holder}", holder)
    logger.info("Task %s is not published: %s will do for it", task.name, holder)
    result = cast(SingletonResult, task.AsyncResult(holder.task_id))
    result.is_duplicate, result.holder = True, holder
    return result


def _cancel(locks: AppLocks, key: str, task_id: str, at_least_for: float = 0.0) -> None:
    try:
        locks.store.cancel(key, task_id, at_least_for)
    except StoreError as error:
        logger.warning("%s; what is reserved for %s ends with its ttl", error, task_id)


def _doubt(
    task: Any, locks: AppLocks, key: str, claimant: Claimant, message: Mapping[str, Any]
) -> None:
    """Wait for less long for a message that the broker may have: the caller will try again."""
    seconds = seconds_until(task.app, message.get("eta"), message.get("countdown"))
    with suppress(StoreError):
        locks.store.reserve(key, claimant, seconds + float(task.lock_ttl))


def _may_be_published(app: Any, error: BaseException, unrelated: BaseException | None) -> bool:
    """Whether the broker may have the message: all is known to be well but its answer."""
    with app.connection_for_write() as connection:  # does not connect
        lost = (OSError, *connection.connection_errors)
    return any(
        not isinstance(each, Exception) or (isinstance(each, lost) and not _is_of_connecting(each))
        for each in _with_causes(error, unrelated)
    )


def _is_of_connecting(error: BaseException) -> bool:
    """Whether it came up before a connection was there: no client library says so."""
    return any(frame.f_code.co_name in _CONNECTING for frame, _ in walk_tb(error.__traceback__))


def _with_causes(error: BaseException, unrelated: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came of: Celery publishes up to four times."""
    seen = [unrelated]
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            yield each
            left += [each.__cause__, each.__context__]
