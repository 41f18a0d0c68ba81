"""What a run does while the store or the broker does not answer: it is not lost (R7)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from celery.exceptions import Reject
from kombu.exceptions import OperationalError

from .conflict import requeue_delay
from .errors import LockHeldError, SingletonError, StoreError
from .locks import AppLocks
from .publishing import Waiting, put_back
from .results import PutBack

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Seconds between two looks whether the worker stops.
LOOK_EVERY = 0.05


def ask_store(task: Any, locks: AppLocks, ask: Callable[[], Answer]) -> Answer:
    """Ask until the store answers, or until the run is back in its queue (R7).

    Raises:
        PutBack: The store did not answer; the run is in its queue again.
        Reject, StoreError: Nor does the broker, and the worker stops; see :func:`_lose`.
    """
    waiting, tries = Waiting.of(task.request), 0
    while True:
        asked_at = time.time()
        try:
            answer = ask()
        except StoreError as error:
            locks.note_absence(error, task.request.singleton_lease.key)
            if task.request.is_eager:
                raise
            reason = error
        else:
            locks.note_presence()
            after = waiting.after_outage()
            if after != waiting:
                after.note_in(task.request)
            return answer
        waiting = waiting.in_outage(asked_at)
        _put_back_or_pause(task, locks, requeue_delay(waiting.requeues + tries), waiting, reason)
        tries += 1


def send_back(
    task: Any, locks: AppLocks, countdown: float, waiting: Waiting, reason: LockHeldError
) -> NoReturn:
    """Put the current run back into its queue, if need be as soon as the broker is back.

    Raises:
        PutBack: It is there.
        Reject, LockHeldError: The broker does not answer, and the worker stops; see :func:`_lose`.
    """
    while True:
        _put_back_or_pause(task, locks, countdown, waiting, reason)


def _put_back_or_pause(
    task: Any, locks: AppLocks, delay: float, waiting: Waiting, reason: SingletonError
) -> None:
    try:
        put_back(task, delay, waiting)
    except (OperationalError, OSError) as error:
        logger.debug("Task %s[%s] cannot go back: %r", task.name, task.request.id, error)
    else:
        raise PutBack(str(reason))
    give_up_at = time.monotonic() + delay
    while time.monotonic() < give_up_at:
        if locks.is_stopping():
            _lose(task, reason)
        time.sleep(LOOK_EVERY)


def _lose(task: Any, reason: SingletonError) -> NoReturn:
    """The worker stops while a run waits in its slot.

    Raises:
        Reject: With late acknowledgement the broker still has the message.
        SingletonError: It was acknowledged early: the run is lost, and logged whole.
    """
    request = task.request
    if task.acks_late:
        raise Reject(str(reason), requeue=True)
    logger.error(
        "Task %s[%s] is lost: it was acknowledged early, the broker does not take it back, and "
        "the worker stops. args=%r kwargs=%r",
        task.name,
        request.id,
        request.args,
        request.kwargs,
    )
    raise reason
