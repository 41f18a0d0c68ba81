"""How one run gets its lock, what happens where it does not, and how it gives it back."""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from typing import Any

from celery.exceptions import Ignore

from .aborting import Abort
from .contention import take
from .errors import StoreError
from .joining import await_outcome, end_as, outcome_in_hand
from .lease import Lease, NestedLease, NullLease
from .locks import AppLocks
from .options import LockOptions
from .phases import has_started, reserved_beside
from .publishing import OWNER_TOKEN, Waiting, forget_waiting, generation_of
from .results import has_succeeded
from .signals import LockEvent, lease_lost, lock_acquired, lock_released
from .stores.base import Claimant

logger = logging.getLogger(__name__)

NO_LEASE = NullLease()


def begin(task: Any, options: LockOptions, args: Any, kwargs: Any) -> None:
    """Take the lock for the current run, or end the run here.

    Raises:
        Ignore: The run was skipped, and its callers were told; or it went back to the queue; or
            its first copy has succeeded already.
        LockHeldError: The run fails, because its policy says so.
        Exception: That of the run which this one has joined.
    """
    request = task.request
    waiting = Waiting.of(request)
    if waiting.is_redelivered:
        _end_if_succeeded(task)
    locks = AppLocks.of(task.app)
    key = options.key(locks.address.key_prefix, args, kwargs)
    enclosing = locks.enclosing_lease(key)
    if enclosing is not None:
        request.singleton_lease = NestedLease(enclosing)
        return
    worker = request.hostname or socket.gethostname()
    claimant = Claimant(request.id, worker, os.getpid(), options.call(args, kwargs))
    owner_token = (request.properties or {}).get(OWNER_TOKEN)
    lease = Lease(
        locks.store,
        key,
        options.lock_ttl,
        claimant,
        owner_token,
        options.lock_at_least_for,
        reserved_beside(options, request, key),
        generation_of(task, request) if options.on_conflict == "rerun" else None,
    )
    # Before the store is asked: whatever ends this run from here on, end() finds the lease.
    request.singleton_lease = lease
    # A task that has another policy by now has no way to return what it shares.
    joined = waiting.joined if options.may_join else ""
    if joined:
        outcome = await_outcome(task, locks, key)
        if outcome is not None:
            request.singleton_lease = NO_LEASE
            end_as(task, joined, outcome)
            return
    take(task, locks, options, lease)
    forget_waiting(request)
    has_started(locks, request, key)
    event = LockEvent(task.name, request.id, key, lease.fencing_token)
    _hold(task, locks, options, lease, event)
    if waiting.is_redelivered:
        # Once more, with the lock in hand: whoever had it until now has stored its result.
        try:
            _end_if_succeeded(task)
        except Ignore:
            with suppress(StoreError):
                locks.let_go(lease)
            raise
    if joined:
        outcome = outcome_in_hand(task, lease, claimant, joined)
        if outcome is not None:
            # It keeps the lock until its own outcome is stored: others may have joined it.
            end_as(task, joined, outcome)
            return
    lease.on_freed = lambda: lock_released.send(sender=task, event=event)
    lock_acquired.send(sender=task, event=event)


def end(task: Any) -> None:
    """Give back what the current run holds. Does nothing the second time, or without a lock."""
    try:
        _give_back(task)
    except BaseException:
        _give_back(task)  # a time limit came up in there; the lock must not live on for it
        raise


def _give_back(task: Any) -> None:
    request = task.request
    lease = vars(request).get("singleton_lease")
    if not isinstance(lease, Lease) or lease.pid != os.getpid():
        return  # the second: a child that the body forked; the lease is its parent's
    abort = vars(request).get("singleton_abort")
    if abort:
        abort.disarm()
    try:
        AppLocks.of(task.app).let_go(lease)
    except StoreError as error:
        # Of a run that has waited for the store, the outage's one warning has told already.
        level = logging.WARNING if lease.fencing_token else logging.DEBUG
        logger.log(level, "%s; the lock %s ends with its ttl", error, lease.key)
    else:
        if lease.is_lost and "singleton_loss" in vars(request):  # else no body has had it
            request.singleton_loss.report()
    vars(request).pop("singleton_lease", None)


def _end_if_succeeded(task: Any) -> None:
    if has_succeeded(task, task.request.id):
        logger.info("Task %s[%s] has succeeded already: not run again", task.name, task.request.id)
        raise Ignore("its first copy succeeded")


def _hold(task: Any, locks: AppLocks, options: LockOptions, lease: Lease, event: LockEvent) -> None:
    """Renew ``lease`` for as long as the body lives, and tell the body when it is lost."""
    request, abort = task.request, None
    if options.on_lease_lost == "abort":
        abort = request.singleton_abort = Abort.here(getattr(task.run, "__code__", None))
    loss = request.singleton_loss = _Loss(task, event)

    def on_lost(_: Lease) -> None:
        if abort:
            abort.fire()
        loss.report()

    locks.hold(lease, on_lost, request)


class _Loss:
    """That a run lost its lease: told once, by the renewal thread or at the run's end."""

    def __init__(self, task: Any, event: LockEvent) -> None:
        self._task = task
        self._event = event
        self._is_told = threading.Lock()

    def report(self) -> None:
        if not self._is_told.acquire(blocking=False):
            return
        logger.warning(
            "Task %s[%s] lost its lease on %s (fencing token %d) before its end: "
            "another run may have started",
            self._event.task_name,
            self._event.task_id,
            self._event.lock_key,
            self._event.fencing_token,
        )
        lease_lost.send(sender=self._task, event=self._event)
