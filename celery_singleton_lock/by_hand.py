"""Locks that are taken by hand: in a body, a web view, a script, a thread."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Union

from .conflict import LONGEST_WAIT
from .errors import Holder, LockHeldError, StoreError
from .lease import Lease, NestedLease, NullLease
from .locks import AppLocks, current_execution
from .options import LockOptions, is_enabled, named_lock_options
from .stores.base import Claimant, Place

logger = logging.getLogger(__name__)


class HandLease:
    """A lock that was taken by hand; renewed until :meth:`release`.

    One that is forgotten without a release is given back too, with a warning, but late.
    """

    def __init__(self, locks: AppLocks, lease: Lease) -> None:
        self._locks = locks
        self._lease = lease

    @property
    def fencing_token(self) -> int:
        """A number that only grows per lock: see :class:`~celery_singleton_lock.Lease`."""
        return self._lease.fencing_token

    @property
    def is_lost(self) -> bool:
        """The lease ended before it was released: somebody else may have the lock now."""
        return self._lease.is_lost

    def check(self) -> None:
        """Return if the lease still lives; asks no store.

        Raises:
            LeaseLostError: It has ended; somebody else may have the lock.
        """
        self._lease.check()

    def release(self) -> bool:
        """Give the lock back; nothing happens the second time.

        Returns:
            Whether this call freed the lock. False also means that it had been lost.

        Raises:
            StoreError: The store did not answer; the lock ends with its ttl.
        """
        if self._lease.pid != os.getpid():
            return False  # a child that was forked in between; the lease is its parent's
        return self._locks.let_go(self._lease)


AnyLease = Union[HandLease, NestedLease, NullLease]


class Lock:
    """A lock that is not taken yet; made by :func:`lock` and ``task.lock()``.

    ::

        with lock(app, "inventory", sku) as lease:
            ...

        lease = lock(app, "inventory", sku).acquire(wait_timeout=5)
        if lease: ...

    One ``Lock`` may be used by several threads, and again. Within one thread, or one task of
    asyncio, it is re-entrant, as is a task's lock within its body: the inner one gives nothing
    back. A block may be left in another thread than it was entered in.

    Not promised: ``lock_at_least_for``, which belongs to runs; signals, which tell of runs; and
    that a ``Lock`` which lives on gives back what a signal interrupted between the lock and the
    block (Ctrl-C in that very moment).

    Args:
        app: The Celery app whose store it is.
        options: How the lock is named and how long it lives.
        args: Of the call whose lock it is.
        kwargs: Likewise.
    """

    def __init__(
        self, app: Any, options: LockOptions, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self._app = app
        self._options = options
        options.key("", args, kwargs)  # what has no key says so here, not at the first use
        self._args, self._kwargs = args, kwargs
        self._entered: list[tuple[object, AnyLease]] = []
        self._leaving = threading.Lock()

    @property
    def key(self) -> str:
        """The lock key.

        Raises:
            ConfigurationError: The app has no store.
        """
        prefix = AppLocks.of(self._app).address.key_prefix
        return self._options.key(prefix, self._args, self._kwargs)

    def acquire(self, wait_timeout: float | timedelta = 0.0) -> AnyLease | None:
        """Take the lock, standing in line for it for so many seconds at most.

        Returns:
            The lease; ``None`` if somebody else had the lock all the time, or had come before.

        Raises:
            StoreError: The store did not answer, so nobody knows whether the lock is free.
        """
        if isinstance(wait_timeout, timedelta):
            wait_timeout = wait_timeout.total_seconds()
        return self._acquire(wait_timeout)[0]

    def holder(self) -> Holder | None:
        """Who has the lock now, or has it kept for itself; ``None`` when it is free.

        Raises:
            StoreError: The store did not answer.
        """
        if not is_enabled(self._app):
            return None
        return AppLocks.of(self._app).store.holder(self.key)

    def __enter__(self) -> AnyLease:
        """Take the lock, waiting for ``wait_timeout`` seconds.

        Raises:
            LockHeldError: Somebody else had it all the time; ``holder`` says who.
            StoreError: The store did not answer.
        """
        timeout = self._options.wait_timeout
        seconds = LONGEST_WAIT if timeout is None else timeout
        lease, holder = self._acquire(seconds)
        if lease is None:
            raise LockHeldError(f"{self.key} was held for {seconds:g} s, now by {holder}", holder)
        self._entered.append((current_execution(), lease))
        return lease

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the lock back. A store that is away is logged: the lock ends with its ttl."""
        lease = self._left()
        try:
            self._give_back(lease)
        except BaseException:
            self._give_back(lease)  # a signal came up in there; the lock must not live on for it
            raise

    def _left(self) -> AnyLease:
        """The lease of the block that is left: the last one that was entered here, or anywhere."""
        here = current_execution()
        with self._leaving:
            entered_here = [pair for pair in self._entered if pair[0] == here]
            last = (entered_here or self._entered)[-1]
            self._entered.remove(last)
        return last[1]

    def _give_back(self, lease: AnyLease) -> None:
        try:
            lease.release()
        except StoreError as reason:
            logger.warning("%s; the lock %s ends with its ttl", reason, self.key)

    def _acquire(self, seconds: float) -> tuple[AnyLease | None, Holder | None]:
        if not is_enabled(self._app):
            return NullLease(), None
        locks = AppLocks.of(self._app)
        enclosing = locks.enclosing_lease(self.key)
        if enclosing is not None:
            return NestedLease(enclosing), None
        # No task id: it is not the run's lock, even if a run takes it.
        claimant = Claimant("", socket.gethostname(), os.getpid())
        lease = Lease(locks.store, self.key, self._options.lock_ttl, claimant)
        try:
            give_up_at = time.monotonic() + seconds
            answer = lease.acquire(Place() if seconds > 0 else None)
            while not answer.is_acquired:
                left = give_up_at - time.monotonic()
                if left <= 0:
                    lease.release()
                    return None, answer.holder
                answer = lease.wait(left)
            held = HandLease(locks, lease)
            locks.hold(lease, _warn_of_loss, held)
        except BaseException:
            with suppress(StoreError):
                locks.let_go(lease)
            raise
        return held, None


def lock(app: Any, lock_name: str, *args: Any) -> Lock:
    """The lock of that name and these arguments, for code that is no task.

    It is the lock of a task with this ``lock_name`` whose ``lock_args`` name as many arguments.
    Its ttl and its ``wait_timeout`` are the app's: ``singleton_lock_ttl`` (30.0 seconds) and
    ``singleton_wait_timeout`` (60.0 seconds).

    Raises:
        ConfigurationError: A setting makes no sense.
        KeyDerivationError: An argument has no lock key.
    """
    return Lock(app, named_lock_options(app, lock_name, len(args)), args, {})


def _warn_of_loss(lease: Lease) -> None:
    logger.warning(
        "The lease on %s (fencing token %d), taken by hand, was lost before it was released: "
        "somebody else may have the lock",
        lease.key,
        lease.fencing_token,
    )
