"""How one run comes by its lock: at once, in line, or not at all, as its policy says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

from .conflict import (
    Conflict,
    Fail,
    Join,
    Outcome,
    Requeue,
    Wait,
    decide,
    policy_name,
    requeue_delay,
)
from .errors import ConfigurationError, LockHeldError
from .lease import Lease
from .locks import AppLocks
from .options import LockOptions
from .outage import ask_store, send_back
from .phases import has_ended
from .publishing import Waiting, note_generation
from .results import DuplicateTaskError, Skipped, fail_followers, is_finished, store_skipped
from .signals import LockEvent, lock_refused
from .stores.base import MOST_PASSES, Acquisition, Place

logger = logging.getLogger(__name__)

#: Seconds that a run waits in its slot although its policy does not say so: for a holder whose body
#: is over, or because it has been passed too often in its queue.
LONGEST_STAY = 1.0

_DID = {
    "skip": "skipped",
    "fail": "failed",
    "requeue": "goes back to the queue",
    "wait": "stands in line",
    "join": "waits in the queue for the outcome of the same call",
}


def take(task: Any, locks: AppLocks, options: LockOptions, lease: Lease) -> None:
    """Acquire ``lease`` for the current run of ``task``, or end the run.

    Raises:
        Ignore: The run was skipped, and its callers were told; or it went back to the queue.
        LockHeldError: The run fails, because its policy says so.
    """
    _Contender(task, locks, options, lease).take()


class _Contender:
    """One run that asks for its lock."""

    def __init__(self, task: Any, locks: AppLocks, options: LockOptions, lease: Lease) -> None:
        self._task = task
        self._request = task.request
        self._locks = locks
        self._options = options
        self._lease = lease
        self._delay = requeue_delay(Waiting.of(task.request).requeues)

    def take(self) -> None:
        """See :func:`take`."""
        answer = self._ask(self._first_place())
        if not answer.is_acquired and self._is_leaving(answer):
            leaving = answer.holder
            answer = self._stay(answer, lambda now: now.holder.task_id != leaving.task_id)
        if not answer.is_acquired:
            self._meet_conflict(answer)

    def _ask(self, place: Place | None) -> Acquisition:
        answer = ask_store(self._task, self._locks, lambda: self._lease.acquire(place))
        note_generation(self._request, answer.generation)
        return answer

    def _wait(self, seconds: float) -> Acquisition:
        return ask_store(self._task, self._locks, lambda: self._lease.wait(seconds))

    def _first_place(self) -> Place | None:
        """Where to stand in line, as far as that is clear before the lock was asked for."""
        policy, waiting = self._options.on_conflict, Waiting.of(self._request)
        if policy == "wait":
            return Place(waiting.place, waiting.served)
        if policy == "rerun":  # the lock is kept for the newest, and nobody else has to come again
            return None
        if policy == "join" or waiting.joined:  # is there a place that it must not lose?
            is_to_go_back = waiting.place > 0
        else:
            is_to_go_back = policy == "requeue" or waiting.is_promised(self._request)
        if is_to_go_back and not self._request.is_eager:
            return Place(waiting.place, waiting.served, self._delay)
        return None

    def _is_leaving(self, answer: Acquisition) -> bool:
        """Whether the holder's body is over: Celery sends links and results before it releases.

        Reads the result backend, except for a policy that loses nothing by waiting. An update is
        the holder's successor anyway.
        """
        holder, request = answer.holder, self._request
        if self._options.on_conflict == "rerun":
            return False
        if not holder.task_id or self._is_with_itself(answer) or not holder.fencing_token:
            return False
        if holder.task_id == Waiting.of(request).joined:
            return False  # it is the outcome that is waited for, not the lock
        if holder.task_id == request.parent_id:
            return True
        is_patient = self._options.on_conflict in ("requeue", "wait")
        return not is_patient and is_finished(self._task, holder.task_id)

    def _stay(
        self, answer: Acquisition, is_pointless: Callable[[Acquisition], bool]
    ) -> Acquisition:
        """Stand in line in the slot, a second at most, or until the lock is ours."""
        give_up_at = time.monotonic() + LONGEST_STAY
        left = LONGEST_STAY
        while not answer.is_acquired and not is_pointless(answer) and left > 0:
            answer = self._wait(left)
            left = give_up_at - time.monotonic()
        return answer

    def _meet_conflict(self, answer: Acquisition) -> None:
        """Return with the lock in hand, or end the run."""
        conflict = self._conflict(answer)
        try:
            name = policy_name(self._options.on_conflict, conflict)
            self._check_joinable(name)
        except Exception as error:  # of a callable
            fail_followers(self._task, error)
            raise
        is_told = False
        while True:
            outcome = decide(name, conflict)
            if not isinstance(outcome, Wait):
                break
            if self._is_stopping():
                outcome = Requeue(self._delay)
                break
            if not is_told:
                self._tell(conflict, outcome)
                is_told = True
            answer = self._wait(outcome.seconds)
            if answer.is_acquired:
                return
            conflict = self._conflict(answer)
        if isinstance(outcome, Join):
            self._join(conflict, outcome)
        if not isinstance(outcome, Requeue):
            self._end(conflict, outcome)
        if answer.seen >= MOST_PASSES:
            # The lock goes from hand to hand: to be awake for a moment is likely to be enough.
            answer = self._stay(answer, self._is_pointless)
        if not answer.is_acquired:
            self._go_back(self._conflict(answer), outcome, answer)

    def _check_joinable(self, name: str) -> None:
        """Raise if the policy is one that no run of this task can follow."""
        reason = self._options.why_no_join
        if name == "join" and reason and not self._request.is_eager:
            raise ConfigurationError(
                f"The on_conflict callable of task {self._task.name} returned 'join', but {reason}"
            )

    def _is_pointless(self, answer: Acquisition) -> bool:
        """Whether the lock cannot come soon, or its run had better go."""
        return answer.is_holder_queued or self._is_with_itself(answer) or self._is_stopping()

    def _is_with_itself(self, answer: Acquisition) -> bool:
        """Whether the lock is held under the run's own task id: nobody stands in line for that."""
        return bool(answer.holder.task_id == self._request.id)

    def _is_stopping(self) -> bool:
        return self._locks.is_stopping() and not self._request.is_eager

    def _conflict(self, answer: Acquisition) -> Conflict:
        request = self._request
        waiting = Waiting.of(request)
        if self._is_with_itself(answer):
            waiting = waiting.behind_itself()
        else:
            waiting = waiting.at_conflict(answer.place)
        waiting.note_in(request)
        return Conflict(
            task_name=self._task.name,
            task_id=request.id,
            lock_key=self._lease.key,
            holder=answer.holder,
            is_holder_queued=answer.is_holder_queued,
            is_same_call=answer.is_same_call,
            is_newest=answer.is_newest,
            is_superseded=answer.is_superseded,
            retries=request.retries,
            is_redelivered=waiting.is_redelivered,
            is_eager=request.is_eager,
            requeues=waiting.requeues,
            delay=self._delay,
            waited=waiting.seconds(),
            wait_timeout=self._options.wait_timeout,
            args=request.args or (),
            kwargs=request.kwargs or {},
        )

    def _tell(self, conflict: Conflict, outcome: Outcome) -> str:
        task_name, task_id = conflict.task_name, conflict.task_id
        key, holder = conflict.lock_key, conflict.holder
        met = "has been had since by the newer" if conflict.is_superseded else "is held by"
        message = f"Task {task_name}[{task_id}] {_DID[outcome.name]}: {key} {met} {holder}"
        logger.info(message)
        event = LockEvent(task_name, task_id, key, holder=holder, outcome=outcome.name)
        lock_refused.send(sender=self._task, event=event)
        return message

    def _go_back(self, conflict: Conflict, outcome: Requeue, answer: Acquisition) -> None:
        """Go back to the queue with a place in line; or return with the lock, if it is free now."""
        waiting = Waiting.of(self._request)
        is_noted_as_queued = answer.place is not None and answer.place.due_in is not None
        stands_in_line = self._options.on_conflict != "rerun"
        if stands_in_line and not is_noted_as_queued and not conflict.is_with_itself:
            answer = self._ask(Place(waiting.place, waiting.served, outcome.countdown))
            if answer.is_acquired:
                return
            waiting = waiting.at_conflict(answer.place)
        self._lease.keep_place()
        message = self._tell(conflict, outcome)
        reason = LockHeldError(message, conflict.holder)
        send_back(self._task, self._locks, outcome.countdown, waiting, reason)

    def _join(self, conflict: Conflict, outcome: Join) -> NoReturn:
        """Go back to the queue for the holder's outcome, without a place in line."""
        message = self._tell(conflict, outcome)
        waiting = Waiting.of(self._request).joining(conflict.holder.task_id)
        reason = LockHeldError(message, conflict.holder)
        send_back(self._task, self._locks, outcome.countdown, waiting, reason)

    def _end(self, conflict: Conflict, outcome: Outcome) -> NoReturn:
        message = self._tell(conflict, outcome)
        has_ended(self._task)
        if isinstance(outcome, Fail):
            held = LockHeldError(f"{message} ({outcome.reason})", conflict.holder)
            fail_followers(self._task, held)
            raise held
        error = DuplicateTaskError(message, conflict.holder)
        if not self._request.is_eager or self._task.app.conf.task_store_eager_result:
            store_skipped(self._task, error)
        skipped = Skipped(message)
        skipped.error = error
        raise skipped
