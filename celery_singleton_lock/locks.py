"""The locks of one app in one process: its store, its renewal, and who holds what right now."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from .address import StoreAddress, find_store
from .lease import ChildLease, Lease
from .renewal import LeaseRenewer
from .stores.base import Claim, LockStore

#: The leases of the execution that runs here, outermost first. Per thread, greenlet and
#: coroutine, like the executions themselves.
_held_here: ContextVar[tuple[tuple[int, Lease], ...]] = ContextVar("held_here", default=())


class AppLocks:
    """One app's store and renewal thread, of this process alone.

    Args:
        address: Where the store is.
    """

    def __init__(self, address: StoreAddress) -> None:
        self.address = address
        self._renewer = LeaseRenewer()
        #: In the main process of a prefork worker: bodies run in children.
        self.runs_in_children = False

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
            found = vars(app).setdefault(name, cls(find_store(app)))
        return found  # type: ignore[no-any-return]

    @property
    def store(self) -> LockStore:
        """Where the locks live."""
        return self.address.store

    def enclosing_lease(self, key: str) -> Lease | None:
        """The lease on ``key`` that the execution around this call holds already."""
        for thread, lease in _held_here.get():
            # Greenlets and threads can inherit a context; they are executions of their own.
            if lease.key == key and lease.store is self.store and thread == threading.get_ident():
                return lease if lease.is_held else None
        return None

    def hold(self, lease: Lease, on_lost: Callable[[Lease], None]) -> None:
        """Renew an acquired lease, and let nested calls find it, until :meth:`let_go`."""
        _held_here.set((*_held_here.get(), (threading.get_ident(), lease)))
        self._renewer.keep(lease, on_lost)

    def renew_for_child(self, claim: Claim, has_ended: Callable[[], bool]) -> None:
        """Renew from the main process what a child holds, until its body has ended."""
        self._renewer.keep(ChildLease(self.store, claim, has_ended), lambda _: None)

    def let_go(self, lease: Lease) -> bool:
        """Release a lease, whatever became of it; see :meth:`Lease.release`."""
        _held_here.set(tuple(entry for entry in _held_here.get() if entry[1] is not lease))
        return lease.release()
