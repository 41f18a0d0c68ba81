"""SingletonTask: Celery's hooks, each a few lines that call downwards."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, ClassVar

from celery import Task, states
from celery.signals import task_postrun

from . import runs
from .bootstep import StoreCheck
from .by_hand import Lock
from .conflict import OnConflict
from .errors import ConfigurationError, Holder, LockHeldError
from .joining import share_outcomes
from .lease import Lease, NestedLease, NullLease
from .options import ATTRIBUTES, GIVEN, LockOptions, is_enabled, lock_options
from .phases import Call, has_ended, is_settled_at_start, publish
from .publishing import GENERATION, generation_now, own_headers
from .request import combined_request
from .results import PutBack, SingletonResult, eager_outcome
from .retrying import passing_on

#: Hook → what happens where an override does not call the next one. Not ``after_return``: under
#: it is the net of ``task_postrun``.
_CONSEQUENCES = {
    "before_start": "its runs take no lock",
    "on_bound": "its options are not read and its runs take no lock",
    "retry": 'lock_on_retry="hold" does nothing',
}


class SingletonTask(Task):
    """At most one run per lock key executes anywhere in the fleet.

    ::

        @app.task(base=SingletonTask)
        def place_order(order_id, sku): ...

    The lock key is the task's name and its arguments, unless ``lock_name`` and ``lock_args``
    say otherwise. The lock is taken when a worker starts the run, renewed while the body lives,
    and given back when it ends, however it ends.

    Not promised: exactly-once side effects (compare ``self.lease.fencing_token`` at the
    resource), and a lock around a direct call ``task(...)``, which no worker sees.

    Wrong values and misspelt names are a ``ConfigurationError`` when Celery binds the task.
    """

    #: Whose lock it is. Default: the task's name. Tasks with one name share locks.
    lock_name: ClassVar[str | None] = None
    #: Which arguments count: one name, several names, or a callable that is given the call's
    #: arguments (no ``self``) and returns one value or a tuple of several. Default: all. In a
    #: class body, wrap a function in ``staticmethod()``.
    lock_args: ClassVar[str | Sequence[str] | Callable[..., Any] | None] = None
    #: Seconds without renewal until the lock is anyone's. Default: ``singleton_lock_ttl``, 30.0.
    lock_ttl: ClassVar[float | timedelta | None] = None
    #: Seconds that the lock is kept at least, from the run's first start, however the run ends
    #: (but for a crash): others meet it so long. The run's own retry passes. Default: 0.0.
    lock_at_least_for: ClassVar[float | timedelta | None] = None
    #: From when on there is at most one: ``"running"``: from its start; ``"queued_and_running"``:
    #: one that waits in its queue and one that runs; ``"lifetime"``: one from its publish to its
    #: end. With the latter two :meth:`apply_async` may publish nothing. Default: ``"running"``.
    lock_phase: ClassVar[str | None] = None
    #: Seconds, from the eta of a message on, until a publish no longer counts whose message is
    #: lost (purged, say). Default: ``singleton_lock_reservation_ttl``, 3600.0.
    lock_reservation_ttl: ClassVar[float | timedelta | None] = None
    #: ``"hold"``: nobody else gets in between a run and its retry. Default:
    #: ``singleton_lock_on_retry``, ``"release"``.
    lock_on_retry: ClassVar[str | None] = None
    #: What becomes of a body whose lease was lost: ``"warn"``: it goes on, with a warning, and
    #: ``self.lease.check()`` raises; ``"abort"``: it is stopped with ``LeaseLostError``, as far as
    #: the pool can (docs/how-it-works.md). Default: ``singleton_on_lease_lost``, ``"warn"``.
    on_lease_lost: ClassVar[str | None] = None
    #: What becomes of a run that finds the lock held: ``"skip"``, ``"fail"``, ``"requeue"``,
    #: ``"wait"``, ``"rerun"``, ``"join"``, or a callable that sees the ``Conflict`` and returns one
    #: of them, but not ``"rerun"``. Default: ``singleton_on_conflict``, ``"skip"``; with
    #: ``"queued_and_running"`` it is ``"requeue"``. Must be said where ``lock_args`` leaves
    #: arguments out. ``"join"`` needs a result backend, and results that are not ignored.
    on_conflict: ClassVar[OnConflict | None] = None
    #: Longest time in seconds that a run under ``"wait"``, ``"requeue"`` or ``"join"`` goes without
    #: its lock; then it fails with ``LockHeldError``, unless it is a retry or a redelivered copy.
    #: Default: ``singleton_wait_timeout``; ``None`` is 60 s for ``"wait"``, else no limit.
    wait_timeout: ClassVar[float | timedelta | None] = None

    Request: str | type = "celery_singleton_lock.request:SingletonRequest"

    #: Strictly private: the options of the class as checked; ``None`` for Celery's own tasks.
    _checked_options: ClassVar[LockOptions | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parents = [base for base in cls.__bases__ if issubclass(base, SingletonTask)]
        known = {owner for parent in parents for owner in _in_front_of_ours(parent)}
        for owner in [each for each in _in_front_of_ours(cls) if each not in known]:
            for hook, consequence in _CONSEQUENCES.items():
                if not _calls_the_next_one(vars(owner).get(hook), hook):
                    base = "" if owner is cls else f", a base of {cls.__qualname__},"
                    warnings.warn(
                        f"{owner.__qualname__}.{hook}(){base} does not call the next one, so "
                        f"{consequence}; write super().{hook}(...) in it",
                        stacklevel=2,
                    )

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Celery's hook: the task belongs to ``app`` now. Checks the options."""
        super().on_bound(app)
        if cls.__module__.partition(".")[0] == "celery":
            # chord_unlock and the like, where this class is the app's task_cls, and maybe bound
            cls._checked_options = None
            return
        _warn_of_a_task_cls_that_is_replaced(cls, app)
        options = lock_options(cls, app)
        if cls.name is None:  # app.register_task names the instance alone, and this way
            options = _named(options, app.gen_task_name(cls.__name__, cls.__module__))
        if GIVEN not in vars(cls):
            setattr(cls, GIVEN, {name: vars(cls).get(name) for name in ATTRIBUTES})
        cls._checked_options = options
        if options.may_join:
            share_outcomes(cls)
        cls.lock_name, cls.lock_ttl = options.lock_name, options.lock_ttl
        cls.lock_at_least_for, cls.lock_on_retry = options.lock_at_least_for, options.lock_on_retry
        cls.on_lease_lost, cls.wait_timeout = options.on_lease_lost, options.wait_timeout
        cls.lock_phase, cls.lock_reservation_ttl = options.lock_phase, options.lock_reservation_ttl
        cls.lock_args = _unbound(options.lock_args)
        cls.on_conflict = _unbound(options.on_conflict)
        if options.on_conflict == "rerun" and not (cls.acks_late and cls.reject_on_worker_lost):
            warnings.warn(
                f"Task {options.task_name} has on_conflict='rerun': the newest update is lost with "
                "a worker that dies with its message. To have it delivered again, set "
                "acks_late=True and reject_on_worker_lost=True",
                stacklevel=2,
            )
        throws = cls.throws if isinstance(cls.throws, (tuple, list)) else (cls.throws,)
        cls.throws = (*(each for each in throws if each is not LockHeldError), LockHeldError)
        app.steps["worker"].add(StoreCheck)

    @property
    def _lock_options(self) -> LockOptions | None:
        """The options of this task, if it takes locks."""
        options = self._own_options
        return options if options and is_enabled(self.app) else None

    @property
    def _own_options(self) -> LockOptions | None:
        """The same whether locks are switched on or off."""
        options = self._checked_options
        # An instance can have a name that its class has not.
        if options is None or options.task_name == self.name:
            return options
        return _named(options, self.name)

    @property
    def lease(self) -> Lease | NestedLease | NullLease:
        """The lease of the current run; outside a locked run a null lease whose checks pass."""
        # Celery 5.4's own ``__call__`` hides the run's request behind one that knows nothing.
        for request in reversed(self.request_stack.stack):
            lease = vars(request).get("singleton_lease")
            if lease is not None:
                return lease  # type: ignore[no-any-return]
        return runs.NO_LEASE

    def lock(self, *args: Any, **kwargs: Any) -> Lock:
        """The lock of one call, to be taken by hand: with the same arguments it is the same lock.

        Raises:
            KeyDerivationError: An argument has no lock key.
            TypeError: The arguments do not fit the task.
        """
        if self._own_options is None:
            raise ConfigurationError(f"{self.name} is one of Celery's own tasks, without a lock")
        return Lock(self.app, self._own_options, *self._as_sent(args, kwargs))

    def holder(self, *args: Any, **kwargs: Any) -> Holder | None:
        """Who has the lock of one call now, or has it kept for itself; ``None`` when it is free.

        Raises:
            StoreError: The store did not answer.
        """
        return self.lock(*args, **kwargs).holder()

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> Any:
        """Publish as Celery does.

        Costs no round trip to the store; with a ``lock_phase`` that begins here one, and may
        publish nothing then, for a run that is under way will do. That one's result is returned,
        with ``is_duplicate`` True and its ``holder``; of all others ``is_duplicate`` is False.

        Raises:
            KeyDerivationError: An argument has no lock key; nothing was published.
            LockHeldError: It is a duplicate, and ``on_conflict`` is "fail"; likewise.
        """
        send = partial(super().apply_async, args, kwargs)
        message = {
            "task_id": task_id,
            "producer": producer,
            "link": link,
            "link_error": link_error,
            "shadow": shadow,
            **options,
        }
        call = self._call(args or (), kwargs or {}, options.get("serializer"))
        if call is not None and call.options.on_conflict == "rerun":
            headers = message.get("headers") or {}
            message["headers"] = {GENERATION: generation_now(), **headers}
        if call is None or not call.is_to_be_reserved or is_settled_at_start(self.app, message):
            return send(**message)
        return publish(self, call, message, lambda **more: send(**{**message, **more}))

    def AsyncResult(self, task_id: str, **kwargs: Any) -> SingletonResult:  # noqa: N802
        """The result of a run of this task."""
        return SingletonResult(
            task_id, backend=self.backend, task_name=self.name, app=self.app, **kwargs
        )

    def apply(
        self,
        args: Any = None,
        kwargs: Any = None,
        link: Any = None,
        link_error: Any = None,
        task_id: str | None = None,
        retries: int | None = None,
        throw: bool | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Run here and now, as Celery does; a skipped run is REVOKED, as in a worker."""
        result = super().apply(
            args, kwargs, link, link_error, task_id, retries, throw, *rest, **options
        )
        is_raised = self.app.conf.task_eager_propagates if throw is None else throw
        return eager_outcome(result, is_raised)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Any = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Retry as Celery does; under ``lock_on_retry="hold"`` the lock is passed on first."""
        with passing_on(self, self._next_call(args, kwargs), eta, countdown):
            if options.get("headers") is not None:
                options["headers"] = {**own_headers(self.request), **options["headers"]}
            return super().retry(args, kwargs, exc, throw, eta, countdown, *rest, **options)

    def start_strategy(self, app: Any, consumer: Any, **kwargs: Any) -> Any:
        """Celery's hook: a worker makes itself ready to receive this task."""
        # Not earlier: a request class that is named by a string may not be importable before.
        self.Request = combined_request(type(self))
        return super().start_strategy(app, consumer, **kwargs)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Celery's hook: take the lock, or end the run."""
        super().before_start(task_id, args, kwargs)
        options = self._lock_options
        if options is not None:
            runs.begin(self, options, args, kwargs)

    def after_return(self, *args: Any) -> None:
        """Celery's hook after a return and after an error: give the lock back."""
        try:
            super().after_return(*args)
        finally:
            runs.end(self)
            has_ended(self)

    def _call(self, args: Any, kwargs: Any, serializer: str | None) -> Call | None:
        """One call of this task, if it takes a lock."""
        options = self._lock_options
        if options is None:
            return None
        try:
            return Call.of(options, *self._as_sent(args, kwargs, serializer))
        except TypeError:
            # Arguments that do not fit: Celery says so, here or (typing=False) in the worker.
            return None

    def _next_call(self, args: Any, kwargs: Any) -> Call | None:
        """What a retry with these arguments calls, if the current run has a lock."""
        if not isinstance(self.lease, Lease):
            return None
        args = self.request.args if args is None else args
        kwargs = self.request.kwargs if kwargs is None else kwargs
        return self._call(args or (), kwargs or {}, None)

    def _as_sent(self, args: Any, kwargs: Any, serializer: str | None = None) -> Any:
        """Celery sends the models of a pydantic task as plain data, except with pickle."""
        dump = getattr(self, "_dump_pydantic_arguments", None)
        if dump is None or (serializer or self.serializer) == "pickle":
            return args, kwargs
        return dump(args, kwargs)


@task_postrun.connect
def _release_after_any_ending(task: Any, state: Any, retval: Any, **_: Any) -> None:
    """The net under ``after_return``, which Celery leaves out after Retry, Ignore, Reject and more.

    Sent from a ``finally``: it comes after every ending that lets the process unwind.
    """
    if isinstance(task, SingletonTask):
        runs.end(task)
        comes_again = isinstance(retval, PutBack) or getattr(retval, "requeue", False)
        # Of one without a state, the worker's main process knows more.
        if state not in (None, states.RETRY) and not comes_again:
            has_ended(task)


def _named(options: LockOptions, name: str) -> LockOptions:
    is_default = options.lock_name == options.task_name
    return replace(options, task_name=name, lock_name=name if is_default else options.lock_name)


def _in_front_of_ours(task_class: type) -> tuple[type, ...]:
    """The classes whose hooks run before those of :class:`SingletonTask`."""
    return task_class.__mro__[: task_class.__mro__.index(SingletonTask)]


def _calls_the_next_one(override: Any, hook: str) -> bool:
    code = getattr(inspect.unwrap(getattr(override, "__func__", override)), "__code__", None)
    if override is None or code is None:
        return True  # inherited, or not to be told
    names = {*code.co_names, *code.co_freevars}
    return bool(names & {"super", "__class__", hook})


def _warn_of_a_task_cls_that_is_replaced(task_class: Any, app: Any) -> None:
    """Celery does not tell that ``base=`` takes the place of the app's own task class."""
    theirs = app.Task.__base__  # Celery derives from it for each app
    if issubclass(task_class, theirs) or theirs.__module__.partition(".")[0] == "celery":
        return  # of Celery's own, only delay_on_commit can be missed, and that is an error
    # Not the task's name: Python shows each text once, and an app may have many tasks.
    ours = task_class.__base__ if "_decorated" in vars(task_class) else task_class
    warnings.warn(
        f"Tasks of class {ours.__qualname__} do nothing of what the app's task_cls "
        f"{theirs.__qualname__} does: base= replaces it. To have both, write "
        f"class Both({ours.__name__}, {theirs.__name__}) and use that",
        stacklevel=2,
    )


def _unbound(value: Any) -> Any:
    """As a class attribute, a callable must not become a method."""
    return staticmethod(value) if callable(value) else value
