"""What a run does while the store does not answer: it is not run, and not lost (R7)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from celery.exceptions import Reject
from kombu.exceptions import OperationalError

from .conflict import requeue_delay
from .errors import Holder, StoreError
from .locks import AppLocks
from .publishing import Waiting, put_back
from .results import PutBack

logger = logging.getLogger(__name__)

#: Seconds between two looks whether the worker stops.
LOOK_EVERY = 0.05


def ask_store(task: Any, locks: AppLocks, ask: Callable[[], Holder]) -> Holder:
    """Ask until the store answers, or until the run is back in its queue (R7).

    Raises:
        PutBack: The store did not answer; the run is in its queue again.
        Reject: Nor does the broker, and the worker stops: the broker still has the message.
        StoreError: As before, but the message was acknowledged early, or never existed.
    """
    request = task.request
    waiting = Waiting.of(request)
    while True:
        try:
            holder = ask()
        except StoreError as error:
            locks.note_absence(error)
            if request.is_eager:
                raise
            reason = error
        else:
            locks.note_presence()
            return holder
        delay = requeue_delay(waiting.requeues)
        try:
            put_back(task, delay, waiting)
        except (OperationalError, OSError) as error:
            logger.debug("Task %s[%s] cannot go back: %r", task.name, request.id, error)
        else:
            raise PutBack(str(reason))
        waiting = replace(waiting, requeues=waiting.requeues + 1)
        _pause(task, locks, delay, reason)


def _pause(task: Any, locks: AppLocks, seconds: float, reason: StoreError) -> None:
    """Neither store nor broker answers: wait in the slot, as long as the worker lives."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        if locks.is_stopping():
            _lose(task, reason)
        time.sleep(LOOK_EVERY)


def _lose(task: Any, reason: StoreError) -> NoReturn:
    request = task.request
    if task.acks_late:
        raise Reject(str(reason), requeue=True)
    logger.error(
        "Task %s[%s] is lost: it was acknowledged early, neither the lock store nor the broker "
        "answers, and the worker stops. args=%r kwargs=%r",
        task.name,
        request.id,
        request.args,
        request.kwargs,
    )
    raise reason
