"""The locks of one app in one process: its store, its renewal, and who holds what right now."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from celery.worker import state as worker_state

from .address import StoreAddress, find_store
from .errors import StoreError
from .keys import probe_key
from .lease import ChildLease, Lease
from .renewal import LeaseRenewer
from .stores.base import Claim, LockStore

logger = logging.getLogger(__name__)


def current_execution() -> tuple[object, ...]:
    """What runs here: a thread or greenlet, and a task of asyncio if it is one."""
    try:
        coroutine = asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        coroutine = None
    return threading.get_ident(), coroutine


class _Held(NamedTuple):
    execution: tuple[object, ...]
    lease: Lease
    is_abandoned: Callable[[], bool]


#: The leases of the execution that runs here, outermost first; and those of the one that has
#: started it, for threads, greenlets and coroutines can inherit a context.
_held_here: ContextVar[tuple[_Held, ...]] = ContextVar("held_here", default=())


class StopFlag:
    """Set in the worker's main process when it stops, and seen in the children that it forked.

    Celery lets running bodies finish in a warm shutdown, and does not tell them of it.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    def set(self, is_stopping: bool) -> None:
        """Say whether the worker stops."""
        self._shared[0] = is_stopping

    def is_set(self) -> bool:
        """Whether it does."""
        return bool(self._shared[0])


class AppLocks:
    """One app's store and renewal thread, of this process alone.

    Args:
        address: Where the store is.
        stop_flag: Set when the worker stops; shared with the processes that it forks.
    """

    def __init__(self, address: StoreAddress, stop_flag: StopFlag) -> None:
        self.address = address
        #: Where the locks live.
        self.store: LockStore = address.new_store()
        self.stop_flag = stop_flag
        self._renewer = LeaseRenewer()
        #: In the main process of a prefork worker: bodies run in children.
        self.runs_in_children = False
        self._is_store_away = False

    @classmethod
    def of(cls, app: Any) -> AppLocks:
        """The locks of ``app``; made at first use, and made anew in a forked child.

        Raises:
            ConfigurationError: The app has no store.
        """
        # By process: a child must not share its parent's connections. By setdefault, which is
        # atomic: a mutex could be held by another thread at the moment of a fork.
        name = f"_singleton_locks_of_{os.getpid()}"
        found = vars(app).get(name)
        if found is None:
            # What the main process found is found in its children, whatever is away by then.
            address = vars(app).get("_singleton_address") or find_store(app)
            vars(app)["_singleton_address"] = address
            stop_flag = vars(app).setdefault("_singleton_stop_flag", StopFlag())
            found = vars(app).setdefault(name, cls(address, stop_flag))
        return found  # type: ignore[no-any-return]

    def enclosing_lease(self, key: str) -> Lease | None:
        """The lease on ``key`` that the execution around this call holds already."""
        for execution, lease, is_abandoned in _held_here.get():
            is_ours = lease.store is self.store and execution == current_execution()
            if is_ours and lease.key == key and lease.is_held and not is_abandoned():
                return lease
        return None

    def hold(self, lease: Lease, on_lost: Callable[[Lease], None], run: object) -> None:
        """Renew an acquired lease, and let nested calls find it, until :meth:`let_go`.

        Or until ``run`` is no more: a signal can keep Celery from telling that it has ended.
        """
        alive = weakref.ref(run)

        def is_abandoned() -> bool:
            return alive() is None

        # Some were let go by another thread, or never.
        others = (held for held in _held_here.get() if not held.lease.is_over)
        _held_here.set((*others, _Held(current_execution(), lease, is_abandoned)))
        self._renewer.keep(lease, on_lost, is_abandoned)

    def __str__(self) -> str:
        return f"{self.store} (from {self.address.origin})"

    def check(self) -> None:
        """Return if the store keeps locks for us.

        Raises:
            StoreError: It does not; the message says which setting led there.
        """
        try:
            self.store.check(probe_key(self.address.key_prefix))
        except StoreError as error:
            raise StoreError(
                f"{error}. Its address is from {self.address.origin}: see that a Redis answers "
                "there, or set singleton_store_url to another one"
            ) from error

    def is_stopping(self) -> bool:
        """Whether the worker shuts down."""
        # Celery's own state is that of this process: enough where bodies run in no other. It is
        # the exit code, and 0 is one.
        should_stop = worker_state.should_stop
        return self.stop_flag.is_set() or (should_stop is not None and should_stop is not False)

    def note_absence(
        self, error: StoreError, key: str, meanwhile: str = "runs go back to their queue"
    ) -> None:
        """Log that the store is away, once per outage and process.

        The first key that was asked for tells where to look if the fault is what lies there.
        """
        if not self._is_store_away:
            self._is_store_away = True
            logger.warning(
                "%s; %s until it keeps locks again. The first wants %s", error, meanwhile, key
            )

    def note_presence(self) -> None:
        """Log that the store is back, if it was away."""
        if self._is_store_away:
            self._is_store_away = False
            logger.info("The lock store %s answers again", self.store)

    def renew_for_child(self, claim: Claim, has_ended: Callable[[], bool]) -> None:
        """Renew from the main process what a child holds, until its body has ended."""
        self._renewer.keep(ChildLease(self.store, claim, has_ended), lambda _: None)

    def let_go(self, lease: Lease) -> bool:
        """Release a lease, whatever became of it; see :meth:`Lease.release`."""
        _held_here.set(tuple(held for held in _held_here.get() if held.lease is not lease))
        return lease.release()
