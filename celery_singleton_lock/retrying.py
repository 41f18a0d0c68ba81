"""What becomes of the lock between a run and its retry."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from celery.exceptions import Retry

from .errors import StoreError
from .lease import Lease
from .phases import Call, coming_again, seconds_until

logger = logging.getLogger(__name__)


@contextmanager
def passing_on(task: Any, call: Call | None, eta: Any, countdown: float | None) -> Iterator[None]:
    """See that the next attempt, while it is published, finds what it is to have.

    ``call`` is the next attempt's, which may have other arguments.

    That is the lock if the task says ``"hold"``, for the countdown and one ttl more; past it the
    retry goes to the queue like anyone's. With a phase that begins at the publish it is what was
    reserved, which the publish has promised for longer. Where no retry is published, it is taken
    back.
    """
    lease = task.lease
    if call is None or not isinstance(lease, Lease):
        yield
        return
    options, is_eager = call.options, task.request.is_eager
    if eta is None and countdown is None:
        countdown = task.default_retry_delay
    seconds = seconds_until(task.app, eta, countdown)
    if not lease.key.endswith(call.key):
        held_for = 0.0
    elif options.lock_phase == "lifetime" and not is_eager:
        held_for = seconds + options.lock_reservation_ttl
    elif options.lock_on_retry == "hold":
        held_for = seconds + options.lock_ttl
    else:
        held_for = 0.0
    with ExitStack() as stack:
        if held_for:
            stack.enter_context(_promising(lease, held_for))
        if call.is_to_be_reserved and not is_eager:
            stack.enter_context(coming_again(task, call, lease.key, seconds))
        yield


@contextmanager
def _promising(lease: Lease, seconds: float) -> Iterator[None]:
    _promise(lease, seconds)
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
