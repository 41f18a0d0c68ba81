"""What the worker's main process does for a run: it outlives the child that runs the body."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.signals import task_unknown
from celery.worker.request import Request
from kombu.utils.imports import symbol_by_name

from .errors import KeyDerivationError, StoreError
from .lease import new_owner_token
from .locks import AppLocks
from .phases import cancel
from .publishing import OWNER_TOKEN, RESERVED
from .results import Skipped, has_succeeded
from .stores.base import Claim

logger = logging.getLogger(__name__)

#: Seconds between two looks at a process that was told to die.
LOOK_EVERY = 0.02


class SingletonRequest(Request):
    """Celery's request, which also makes the owner token, and frees the lock of a dead child.

    The token is made per delivery, here, because only here a redelivered message differs from
    its first copy; and it is known here, because a killed child cannot release anything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In the properties: they reach the child, and unlike headers are not sent with a retry.
        self._owner_token = new_owner_token()
        properties = {**self._request_dict["properties"], OWNER_TOKEN: self._owner_token}
        self._request_dict["properties"] = properties

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Celery's hook: a process of the pool has taken the run."""
        super().on_accepted(pid, time_accepted)
        locks = self._locks()
        if locks is None or not locks.runs_in_children:
            return
        claim = self._claim(locks)
        if claim is not None:
            locks.renew_for_child(claim, body_has_ended(self, pid))

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Celery's hook for time limits. After the hard one the child is killed, but not yet."""
        super().on_timeout(soft, timeout)
        locks = self._locks()
        if not soft and locks is not None and locks.runs_in_children:
            threading.Thread(
                target=self._release_when_gone,
                args=(self._comes_again(TimeLimitExceeded()),),
                name="singleton-lock-release",
                daemon=True,
            ).start()

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Celery's hook for every ending that is not a return, ``Ignore`` included."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, (WorkerLostError, Terminated)):
            # Before Celery requeues the message: its copy starts at once.
            self._release(self._comes_again(error))
        result = super().on_failure(exc_info, *args, **kwargs)
        if isinstance(error, Skipped):
            # After Ignore, Flower would show STARTED for ever: it reads events only.
            self.send_event("task-revoked", terminated=False, signum=None, expired=False)
        return result

    def _announce_revoked(self, reason: Any, terminated: bool, signum: Any, expired: bool) -> None:
        """Celery's hook for a revoked or expired run, one whose body may live on included."""
        super()._announce_revoked(reason, terminated, signum, expired)
        if not terminated:
            self._cancel()

    @property
    def has_reported(self) -> bool:
        """Whether the pool has an outcome of this run."""
        result = self._apply_result and self._apply_result()  # Celery keeps a weak reference
        return result is None or result.ready()

    def _locks(self) -> AppLocks | None:
        return None if self.task._lock_options is None else AppLocks.of(self._app)

    def _claim(self, locks: AppLocks) -> Claim | None:
        options = self.task._lock_options
        try:
            key = options.key(locks.address.key_prefix, self.args, self.kwargs)
        except (KeyDerivationError, TypeError):
            return None  # then the child has no lock either
        return Claim(key, self._owner_token, options.lock_ttl)

    def _comes_again(self, error: BaseException) -> bool:
        """Whether the message of a run that died of this goes to another worker."""
        task = self.task
        if isinstance(error, WorkerLostError):
            if getattr(task, "retry_on_worker_lost", False):  # new in Celery 5.7
                return task.max_retries is None or self._context.retries < task.max_retries
            return bool(task.acks_late and task.reject_on_worker_lost)
        if isinstance(error, TimeLimitExceeded):
            return bool(task.acks_late and not _acks_on_timeout(task))
        return False

    def _cancel(self) -> None:
        """Give back what is kept for a run that will not come."""
        options, locks = self.task._lock_options, self._locks()
        if options is None or locks is None:
            return
        headers = dict(self._message.headers or {})
        claim = self._claim(locks) if options.on_conflict == "rerun" else None
        if claim is not None:
            headers[RESERVED] = claim.key  # it may be the follow-up
        cancel(self._app, headers, self.id, options.lock_at_least_for)

    def _release(self, comes_again: bool) -> None:
        locks = self._locks()
        if locks is None:
            return
        claim = self._claim(locks)
        if claim is None:
            return
        options = self.task._lock_options
        try:
            if self._has_to_find_its_lock(comes_again):
                locks.store.hold(claim.key, claim.owner_token, options.lock_reservation_ttl)
            if locks.store.release(claim.key, claim.owner_token):
                logger.info("Freed %s, whose run %s[%s] died", claim.key, self.name, self.id)
            elif not comes_again:
                self._cancel()  # it died before it had its lock
        except StoreError as error:
            logger.warning("%s; the lock of dead run %s ends with its ttl", error, self.id)

    def _has_to_find_its_lock(self, comes_again: bool) -> bool:
        """Whether its next copy is to have the lock, as for a retry.

        If SUCCESS is stored, there is none that runs: Celery acknowledges the message since 5.7,
        and before that the copy ends at once.
        """
        is_for_its_lifetime = self.task._lock_options.lock_phase == "lifetime"
        return comes_again and is_for_its_lifetime and not has_succeeded(self.task, self.id)

    def _release_when_gone(self, comes_again: bool) -> None:
        while not is_gone(self.worker_pid):
            time.sleep(LOOK_EVERY)
        self._release(comes_again)


def combined_request(task_class: type) -> type[Request]:
    """The request class of a task: ours, and those that it or its other bases ask for.

    Ours comes first, so that a method of theirs which does not call the next one leaks no lock.
    """
    found: list[type] = []
    for owner in task_class.__mro__:
        if "Request" in vars(owner):
            request_class = symbol_by_name(vars(owner)["Request"])  # type: ignore[no-untyped-call]
            if not any(issubclass(other, request_class) for other in found):
                # One that this one extends is in it already, and Python takes none before its heir.
                found = [each for each in found if not issubclass(request_class, each)]
                found.append(request_class)
    if len(found) == 1:
        return found[0]
    bases = sorted(found, key=lambda each: not issubclass(each, SingletonRequest))
    return type("+".join(each.__name__ for each in bases), tuple(bases), {})


def body_has_ended(request: SingletonRequest, pid: int) -> Callable[[], bool]:
    """Tells when: the child has reported, or is gone. Does not keep the request alive."""
    alive = weakref.ref(request)

    def has_ended() -> bool:
        request = alive()
        return request is None or request.has_reported or is_gone(pid)

    return has_ended


def is_gone(pid: int) -> bool:
    """Whether a child process of this one has ended. Leaves it to be reaped by the pool."""
    try:
        if hasattr(os, "waitid"):
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        os.kill(pid, 0)  # macOS before Python 3.13: known as soon as the pool has reaped it
        return False
    except (ChildProcessError, ProcessLookupError):  # reaped already
        return True


@task_unknown.connect
def _cancel_what_nobody_knows(sender: Any, message: Any, **sent: Any) -> None:
    """A worker of another release got the message, and has thrown it away."""
    cancel(sender.app, message.headers or {}, sent["id"])


def _acks_on_timeout(task: Any) -> bool:
    # Celery 5.7 has split the older option.
    is_acked = getattr(task, "acks_on_timeout", None)
    return bool(task.acks_on_failure_or_timeout if is_acked is None else is_acked)
