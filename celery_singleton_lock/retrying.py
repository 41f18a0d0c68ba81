"""What becomes of the lock between a run and its retry."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from celery.exceptions import Retry

from .errors import StoreError
from .lease import Lease
from .options import LockOptions

logger = logging.getLogger(__name__)


@contextmanager
def passing_on(
    task: Any, options: LockOptions | None, eta: datetime | None, countdown: float | None
) -> Iterator[None]:
    """Promise the lock to the next attempt while it is published, if the task says ``"hold"``.

    The promise stands for the countdown and one ttl more; past it the retry goes to the queue
    like anyone's. Where no retry is published, it is taken back.
    """
    lease = task.lease
    if options is None or options.lock_on_retry != "hold" or not isinstance(lease, Lease):
        yield
        return
    _promise(lease, _seconds_until(task, eta, countdown) + options.lock_ttl)
    try:
        yield
    except Retry:
        raise
    except BaseException:
        _promise(lease, 0.0)
        raise


def _promise(lease: Lease, seconds: float) -> None:
    try:
        lease.hold(seconds)
    except StoreError as error:
        # The retry is worth more than its place: it goes to the queue like anyone's.
        logger.warning("%s; %s is not held for a retry", error, lease.key)


def _seconds_until(task: Any, eta: datetime | None, countdown: float | None) -> float:
    if eta is not None:
        return max(0.0, (eta - datetime.now(eta.tzinfo)).total_seconds())
    return float(task.default_retry_delay if countdown is None else countdown)
