"""Keep leases alive while their runs go on: one thread, a heap of deadlines.

Every lease that is due soon is renewed in the same pipelined trip, so a thousand held leases
cost one round trip per third of their ttl. Wraps leases from outside: a store knows of no
thread, and a lost lease is reported through a callback.

What a thread cannot do: renew while the body holds the GIL in a C call, or, with gevent and
eventlet, while the body does not yield. Such a call must be shorter than two thirds of the ttl.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Union, cast

from .errors import StoreError
from .lease import ChildLease, Lease
from .stores.base import LockStore

logger = logging.getLogger(__name__)

#: A lease is renewed when this part of its ttl has passed: two more tries fit into the rest.
RENEW_AFTER = 1 / 3
#: A lease may go along with an earlier one by this part of its ttl, so that trips grow together.
RENEW_EARLY = 1 / 6
#: Seconds; leases with a long ttl are looked at more often, so that those that are over go.
LONGEST_PAUSE = 60.0
#: After a trip that the store did not answer, the next one comes after this part of the ttl.
RETRY_AFTER = 1 / 10

RenewableLease = Union[Lease, ChildLease]
OnLost = Callable[[Any], None]


class _Kept(NamedTuple):
    due: float
    order: int  # no two are equal, so that tuples never compare leases
    lease: RenewableLease
    on_lost: OnLost
    is_abandoned: Callable[[], bool]


class LeaseRenewer:
    """Renews every lease that it was given until the lease is over.

    The thread starts with the first lease and ends when there is none left. It belongs to the
    process that started it, and is a daemon: it never keeps a process alive.

    Args:
        clock: Seconds; the same clock as the leases'.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[_Kept] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_store_away = False

    def keep(
        self,
        lease: RenewableLease,
        on_lost: OnLost,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        """Renew ``lease`` from now on; call ``on_lost`` once, from the thread, if it is lost.

        A lease that is abandoned, because what held it is gone without a word, is released.
        """
        kept = _Kept(0.0, 0, lease, on_lost, is_abandoned)
        with self._changed:
            self._push(kept, RENEW_AFTER)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="singleton-lease-renewal", daemon=True
                )
                self._thread.start()
            elif self._heap[0].lease is lease:
                self._changed.notify()

    def renew_due(self) -> None:
        """Renew what is due, in one trip per store. The thread does nothing else."""
        by_store: dict[LockStore, list[_Kept]] = {}
        for kept in self._take_due():
            if kept.is_abandoned():
                self._give_back(kept)
                continue
            by_store.setdefault(kept.lease.store, []).append(kept)
        for store, due in by_store.items():
            self._renew(store, due)

    def _run(self) -> None:
        pid = os.getpid()
        while os.getpid() == pid:  # eventlet: a fork copies greenlets
            with self._changed:
                if not self._heap:
                    self._thread = None
                    return
                self._changed.wait(max(0.0, self._heap[0].due - self._clock()))
            try:
                self.renew_due()
            except Exception:
                # Without this thread every lease of the process would end with its ttl.
                logger.exception("Renewing leases failed; it goes on")

    def _take_due(self) -> list[_Kept]:
        now = self._clock()
        taken = []
        with self._changed:
            while self._heap and self._heap[0].due <= now:
                taken.append(heapq.heappop(self._heap))
            while taken and self._heap:
                due, _, lease, *_ = self._heap[0]
                early = min(lease.ttl * RENEW_EARLY, LONGEST_PAUSE / 2)
                if not lease.is_over and due - early > now:
                    break
                taken.append(heapq.heappop(self._heap))
        return [kept for kept in taken if not kept.lease.is_over]

    def _renew(self, store: LockStore, due: list[_Kept]) -> None:
        asked_at = self._clock()
        try:
            answers: Sequence[bool] = store.renew_many([kept.lease.claim for kept in due])
        except Exception as error:
            self._put_off(due, error)
            return
        is_all_answered = True
        for kept, is_ours in zip(due, answers, strict=True):
            try:
                if not is_ours and self._is_restored(kept):
                    continue
            except Exception as error:
                self._put_off([kept], error)
                is_all_answered = False
                continue
            kept.lease.confirm(asked_at, is_ours)
            if kept.lease.is_held:
                self._push(kept, RENEW_AFTER)
            elif is_ours and not kept.lease.is_over:
                self._push(kept, 0.0)  # the answer came so late that it proves nothing about now
            else:
                self._report_lost(kept)
        if is_all_answered and self._is_store_away:
            self._is_store_away = False
            logger.info("The lock store %s answers again; leases are renewed", store)

    def _is_restored(self, kept: _Kept) -> bool:
        if not kept.lease.restore():
            return False
        logger.warning(
            "The lock store %s has lost data: %s was put back, its run goes on",
            kept.lease.store,
            kept.lease.key,
        )
        self._push(kept, RENEW_AFTER)
        return True

    def _put_off(self, due: list[_Kept], error: Exception) -> None:
        if not isinstance(error, StoreError):
            # A mistake, here or in the store; the leases must not be forgotten for it.
            logger.error("Renewing %d leases failed", len(due), exc_info=error)
        elif not self._is_store_away:
            self._is_store_away = True
            logger.warning("%s. Leases cannot be renewed; it is tried until they end", error)
        for kept in due:
            if kept.lease.is_lost:
                self._report_lost(kept)
            else:
                self._push(kept, RETRY_AFTER)

    def _give_back(self, kept: _Kept) -> None:
        logger.warning("The run that held %s has ended without giving it back", kept.lease.key)
        try:
            cast(Lease, kept.lease).release()  # a child's is never abandoned
        except Exception as error:
            logger.warning("%s; the lock %s ends with its ttl", error, kept.lease.key)

    def _push(self, kept: _Kept, part_of_ttl: float) -> None:
        due = self._clock() + min(kept.lease.ttl * part_of_ttl, LONGEST_PAUSE)
        with self._changed:
            heapq.heappush(self._heap, kept._replace(due=due, order=next(self._order)))

    def _report_lost(self, kept: _Kept) -> None:
        if not kept.lease.is_lost:
            return  # it was released meanwhile
        try:
            kept.on_lost(kept.lease)
        except Exception:
            logger.exception("What was to be done about lost lease %s failed", kept.lease.key)
