"""What the callers of a run that did not run are told."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from billiard.exceptions import WorkerLostError
from celery import states
from celery.app import backends
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.exceptions import ChordError, Ignore, TaskRevokedError
from celery.result import AsyncResult, EagerResult
from celery.utils.functional import maybe_list

from .errors import Holder, LockHeldError

logger = logging.getLogger(__name__)


class StoredOutcome(NamedTuple):
    """What the result backend says of a run.

    Attributes:
        state: Its state; ``None`` where nobody can tell.
        result: The value that it returned, or the error that it raised.
    """

    state: str | None
    result: Any

    @property
    def is_sharable(self) -> bool:
        """Whether it is the outcome of a body: a value, or an error that others can raise."""
        return self.state == states.SUCCESS or (
            self.state == states.FAILURE
            and isinstance(self.result, Exception)
            and not isinstance(self.result, WorkerLostError)
        )

    @property
    def is_none_ever(self) -> bool:
        """Whether the run has ended, and no body's outcome will come: revoked, or killed."""
        return self.state in states.READY_STATES and not self.is_sharable


class DuplicateTaskError(LockHeldError, TaskRevokedError):
    """The run was skipped, because another one holds the lock; ``holder`` says which.

    ``.get()`` on the skipped run's result raises it. It is also Celery's ``TaskRevokedError``:
    whoever handles revoked tasks handles skipped ones.
    """


class SingletonResult(AsyncResult):
    """Celery's result, which also tells whether the call was published.

    Attributes:
        is_duplicate: It was not: this is the result of the run that will do for it.
        holder: If so, which run that is, as the store tells it.
    """

    is_duplicate: bool = False
    holder: Holder | None = None

    def __copy__(self) -> SingletonResult:
        copied = cast(SingletonResult, super().__copy__())
        copied.is_duplicate, copied.holder = self.is_duplicate, self.holder
        return copied


class Skipped(Ignore):
    """Strictly between the pool and the worker's main process: this run was skipped.

    Or, of an eager run, between it and its caller; ``error`` is what that one is told.
    """

    error: DuplicateTaskError | None = None


class PutBack(Ignore):
    """Strictly between the pool and the worker's main process: this run went back to the queue."""


def store_skipped(task: Any, error: DuplicateTaskError) -> None:
    """Store REVOKED for the current run, and tell its chord and whatever would have followed it.

    Celery's ``mark_as_revoked`` would store its own exception, without a holder.
    """
    request = task.request
    fail_followers(task, error, states.REVOKED)
    task.backend.mark_as_failure(
        request.id,
        error,
        request=request,
        store_result=not ignores_result(task),
        call_errbacks=False,
        state=states.REVOKED,
    )


def fail_followers(task: Any, error: Exception, state: str = states.FAILURE) -> None:
    """Store an outcome for all that would have followed the current run, which does not run.

    Celery tells the steps of a chain, and a chord whose body is one task. What else there is it
    leaves PENDING for ever, some of it depending on its version: groups and chords that are
    steps of a chain, a chord around a chord, a body that is a chain or a group, links, and what
    follows a run whose own result is ignored.
    """
    request = task.request
    if request.is_eager:
        return  # its caller is told, and sends nothing else
    for follower in _single_tasks((*(request.chain or ()), *(request.callbacks or ()))):
        _fail(task, follower, error, state)
    request.chain = None  # else Celery tells the chord of the same steps again
    if request.chord:
        _fail_body(task, request, error)


def _fail(task: Any, follower: Context, error: Exception, state: str) -> None:
    if is_finished(task, follower.id):
        return  # it had its turn: the run is a second copy of one that is long over
    try:
        task.backend.store_result(follower.id, error, state, request=follower)
        if follower.chord:
            task.backend.on_chord_part_return(follower, state, error)
    except Exception:
        logger.exception("Could not store that %s will not run; others are told", follower.id)
    if follower.chord:
        _fail_body(task, follower, error)


def _fail_body(task: Any, member: Any, error: Exception) -> None:
    """Tell the body of a member's chord at once; Celery does when the header is complete."""
    if member.chord.get("subtask_type") != "group":  # whose members Celery gives the error itself
        error = ChordError(f"Dependency {member.id} raised {error!r}")
    for follower in _single_tasks([member.chord]):
        _fail(task, follower, error, states.FAILURE)


def _single_tasks(signatures: Iterable[Mapping[str, Any]]) -> Iterator[Context]:
    """The tasks that these consist of, and their links: as requests that know their chord."""
    for signature in signatures:
        kind, options = signature.get("subtask_type"), signature["options"]
        inner = signature["kwargs"]
        if kind == "chord":
            for member in _single_tasks(maybe_list(inner["header"])):
                member.chord = None  # it was not sent, and waits for nobody
                yield member
            yield from _single_tasks([inner["body"]])
        elif kind in ("chain", "group"):
            yield from _single_tasks(inner["tasks"])
        elif options.get("task_id"):
            yield Context(options, id=options["task_id"], group=options.get("group_id"))
        yield from _single_tasks(maybe_list(options.get("link")) or ())


def eager_outcome(result: Any, throw: bool) -> Any:
    """The result of an eager run as of a worker's: REVOKED, if it was skipped.

    Raises:
        DuplicateTaskError: It was skipped, and its errors are to be raised.
    """
    error = getattr(result.result, "error", None) if isinstance(result.result, Skipped) else None
    if error is not None:
        if throw:
            raise error
        result = EagerResult(result.id, error, states.REVOKED)
    result.is_duplicate, result.holder = False, None  # as of a SingletonResult
    return result


def is_finished(task: Any, task_id: str) -> bool:
    """Whether an outcome of this run is stored; False where nobody can tell."""
    return _stored_state(task, task_id) in states.READY_STATES


def has_succeeded(task: Any, task_id: str) -> bool:
    """Whether SUCCESS is stored for this run. Only that says that its message is done with.

    FAILURE does not: ``acks_on_timeout=False`` stores it and then requeues the message.
    """
    return bool(_stored_state(task, task_id) == states.SUCCESS)


def stored_outcome(task: Any, task_id: str) -> StoredOutcome:
    """What is stored of this run by now. One read of the result backend."""
    try:
        meta = task.backend.get_task_meta(task_id)
        return StoredOutcome(meta["status"], meta.get("result"))
    except Exception:
        return StoredOutcome(None, None)  # as below; or its error cannot be rebuilt here


def why_no_join(task_class: Any, app: Any) -> str:
    """Why no run of this task can have the outcome of another one; empty if it can.

    Connects to nothing. With ``task_always_eager`` nobody goes to a queue to wait for it.
    """
    if app.conf.task_always_eager:
        return ""
    if task_class.ignore_result:
        return "its results are ignored: set ignore_result=False on it, or choose another policy"
    backend_class = _backend_class(task_class, app)
    if issubclass(backend_class, DisabledBackend):
        return "there is no result backend: set result_backend, or choose another policy"
    if backend_class.__module__ == "celery.backends.rpc":
        return (
            "with an rpc:// result backend only the caller can read an outcome: set "
            "result_backend to another one, or choose another policy"
        )
    return ""


def _backend_class(task_class: Any, app: Any) -> type:
    own = task_class.backend
    if not isinstance(own, property):
        return type(own)
    found: type = backends.by_url(app.backend_cls or app.conf.result_backend, app.loader)[0]
    return found


def _stored_state(task: Any, task_id: str) -> str | None:
    try:
        return cast(str, task.backend.get_state(task_id))
    except Exception:
        return None  # there is no result backend, or none that can be asked, or it is away


def ignores_result(task: Any) -> bool:
    """Whether nobody is to hear of the current run's outcome: as its caller says, or its task."""
    # Celery's Context has a class-level default that looks like an explicit False.
    said_by_caller = vars(task.request).get("ignore_result")
    return bool(task.ignore_result if said_by_caller is None else said_by_caller)
