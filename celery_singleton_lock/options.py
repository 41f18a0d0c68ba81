"""What a task says about its lock: task attribute, else the app's setting, else the default.

Read once, when Celery binds the task to its app, into one frozen object.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from typing import Any

from .conflict import POLICIES, OnConflict, policy_names
from .errors import ConfigurationError, KeyDerivationError
from .keys import LockArgs, call_digest, call_key, check_key_prefix
from .results import why_no_join

DEFAULT_KEY_PREFIX = "singleton:"
DEFAULT_LOCK_TTL = 30.0
DEFAULT_RESERVATION_TTL = 3600.0
#: From when on there is at most one copy: from its start; from its publishing to its start, and
#: one that runs; from its publishing to its end.
PHASES = ("running", "queued_and_running", "lifetime")
#: Seconds; longer ones are mistakes, and break the arithmetic of servers and threads.
LONGEST = 366 * 24 * 3600.0
#: Where a bound task class keeps the options that it was given, as against effective ones.
GIVEN = "_lock_given"

#: Task attribute → the setting that gives its default for the whole app.
ATTRIBUTES: Mapping[str, str | None] = {
    "lock_name": None,
    "lock_args": None,
    "lock_ttl": "singleton_lock_ttl",
    "lock_at_least_for": None,
    "lock_phase": None,
    "lock_reservation_ttl": "singleton_lock_reservation_ttl",
    "lock_on_retry": "singleton_lock_on_retry",
    "on_lease_lost": "singleton_on_lease_lost",
    "on_conflict": "singleton_on_conflict",
    "wait_timeout": "singleton_wait_timeout",
}
SETTINGS = (
    "singleton_enabled",
    "singleton_store_url",
    "singleton_key_prefix",
    *(setting for setting in ATTRIBUTES.values() if setting),
)


@dataclass(frozen=True)
class LockOptions:
    """How one task locks.

    Attributes:
        task_name: The task.
        lock_name: Whose lock it is; tasks with one name share locks.
        lock_args: Which arguments count: ``None`` for all, names, or a callable.
        lock_ttl: Seconds without renewal until the lock is anyone's.
        lock_at_least_for: Seconds that the lock is kept at least, from the run's first start.
        lock_phase: "running", "queued_and_running" or "lifetime".
        lock_reservation_ttl: Seconds that a reservation outlives the eta of a lost message.
        lock_on_retry: "release", or "hold": nobody else gets in before the retry.
        on_lease_lost: "warn", or "abort": the body is stopped.
        on_conflict: What becomes of a run that meets a held lock.
        wait_timeout: Longest time in seconds without the lock; ``None`` for the policy's own.
        signature: The body's signature, without a bound ``self``.
        why_no_join: Why the policy cannot be "join"; empty where it can, or is never.
    """

    task_name: str
    lock_name: str
    lock_args: LockArgs
    lock_ttl: float
    lock_at_least_for: float
    lock_phase: str
    lock_reservation_ttl: float
    lock_on_retry: str
    on_lease_lost: str
    on_conflict: OnConflict
    wait_timeout: float | None
    signature: inspect.Signature
    why_no_join: str = ""

    @property
    def tells_its_call(self) -> bool:
        """Whether a run has to say which call it is, for others of the task to compare."""
        return self.may_join or self.lock_phase != "running"

    @property
    def may_join(self) -> bool:
        """Whether a run may end with the outcome of another one."""
        return self.on_conflict == "join" or callable(self.on_conflict)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Which call this is, with all its arguments; empty where nobody compares.

        And where they cannot be compared: the lock leaves out one that has no canonical form.
        """
        if not self.tells_its_call:
            return ""
        try:
            return call_digest(self.task_name, self.signature, args, kwargs)
        except KeyDerivationError:
            return ""

    def key(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The lock key of one call; see :func:`celery_singleton_lock.keys.call_key`."""
        return call_key(
            prefix, self.lock_name, self.task_name, self.signature, self.lock_args, args, kwargs
        )


def is_enabled(app: Any) -> bool:
    """Whether the app's tasks take locks at all: ``singleton_enabled``, True by default.

    Asked anew each time, so that a test can switch it.
    """
    value = app.conf.get("singleton_enabled")
    if value is None or isinstance(value, bool):
        return value is not False
    raise ConfigurationError(f"The setting singleton_enabled must be True or False, not {value!r}")


def lock_options(task_class: Any, app: Any) -> LockOptions:
    """The options of a task that is being bound to ``app``, checked.

    Raises:
        ConfigurationError: Something makes no sense, or a name is misspelt.
    """
    _check_settings(app)
    _check_attribute_names(task_class)
    reader = _Reader(task_class, app)
    signature = _body_signature(task_class)
    lock_args, lock_phase = reader.lock_args(signature), reader.one_of("lock_phase", *PHASES)
    on_conflict = reader.on_conflict(lock_phase)
    if on_conflict is None:
        _check_every_argument_counts(task_class.name, lock_args, signature)
    lock_ttl = reader.seconds("lock_ttl")
    reason = why_no_join(task_class, app) if on_conflict == "join" or callable(on_conflict) else ""
    if on_conflict == "join" and reason:
        raise ConfigurationError(f"on_conflict of task {task_class.name} is 'join', but {reason}")
    return LockOptions(
        task_name=task_class.name,
        lock_name=reader.lock_name() or task_class.name,
        lock_args=lock_args,
        lock_ttl=DEFAULT_LOCK_TTL if lock_ttl is None else lock_ttl,
        lock_at_least_for=reader.seconds("lock_at_least_for", may_be_zero=True) or 0.0,
        lock_phase=lock_phase,
        lock_reservation_ttl=reader.seconds("lock_reservation_ttl") or DEFAULT_RESERVATION_TTL,
        lock_on_retry=reader.one_of("lock_on_retry", "release", "hold"),
        on_lease_lost=reader.one_of("on_lease_lost", "warn", "abort"),
        on_conflict=on_conflict or "skip",
        wait_timeout=reader.seconds("wait_timeout"),
        signature=signature,
        why_no_join=reason,
    )


def named_lock_options(app: Any, lock_name: str, count: int) -> LockOptions:
    """The options of a lock that is no task's, and has so many arguments; checked.

    Raises:
        ConfigurationError: A setting makes no sense.
    """
    _check_settings(app)
    if not isinstance(lock_name, str) or not lock_name:
        raise ConfigurationError(
            f"The name of a lock must be a string that is not empty, not {lock_name!r}"
        )
    reader = _Reader(object, app)
    names = tuple(f"argument_{number}" for number in range(1, count + 1))
    return LockOptions(
        task_name=lock_name,
        lock_name=lock_name,
        lock_args=names,
        lock_ttl=reader.seconds("lock_ttl") or DEFAULT_LOCK_TTL,
        lock_at_least_for=0.0,
        lock_phase="running",
        lock_reservation_ttl=DEFAULT_RESERVATION_TTL,
        lock_on_retry="release",
        on_lease_lost="warn",
        on_conflict="wait",
        wait_timeout=reader.seconds("wait_timeout"),
        signature=inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
        ),
    )


def key_prefix(app: Any, outer_prefix: str, outer_origin: str) -> str:
    """The app's key prefix, behind the ``global_keyprefix`` of the connection that is reused."""
    prefix = app.conf.get("singleton_key_prefix")
    if prefix is None:
        prefix = DEFAULT_KEY_PREFIX
    if not isinstance(prefix, str):
        raise ConfigurationError(
            f"The setting singleton_key_prefix must be a string, not {prefix!r}"
        )
    check_key_prefix(outer_prefix, outer_origin)
    return outer_prefix + check_key_prefix(prefix, "The setting singleton_key_prefix")


class _Reader:
    """Reads one task's options; knows where each value is from, for the error message.

    Given ``object``, which has no options, it reads the app's settings.
    """

    def __init__(self, task_class: Any, app: Any) -> None:
        self._task_class = task_class
        self._app = app

    def read(self, attribute: str) -> tuple[Any, str]:
        for owner in self._task_class.__mro__:
            # A bound class shows effective values; its subclasses inherit what it was given.
            value = vars(owner).get(GIVEN, vars(owner)).get(attribute)
            # A callable given as a task option is a function in the class that Celery builds; an
            # instance would pass itself as its first argument.
            value = value.__func__ if isinstance(value, staticmethod) else value
            if value is not None:
                return value, f"{attribute} of task {self._task_class.name}"
        setting = ATTRIBUTES[attribute]
        return (self._app.conf.get(setting) if setting else None), f"The setting {setting}"

    def lock_name(self) -> str | None:
        value, origin = self.read("lock_name")
        if value is None or (isinstance(value, str) and value):
            return value
        raise ConfigurationError(f"{origin} must be a string that is not empty, not {value!r}")

    def lock_args(self, signature: inspect.Signature) -> LockArgs:
        value, origin = self.read("lock_args")
        if value is None:
            return None
        if callable(value):
            _check_takes_no_self(value, origin, "the call's arguments")
            return value  # type: ignore[no-any-return]
        names = (value,) if isinstance(value, str) else value
        # In an order that is the same everywhere, which a set's is not.
        if not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
            raise ConfigurationError(
                f"{origin} must be the name of an argument, several names, or a callable of the "
                f"call's arguments, not {value!r}"
            )
        names = tuple(names)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for name in names:
            if name not in signature.parameters and not takes_any:
                raise ConfigurationError(
                    f"{origin} names {name!r}, but the task takes "
                    f"{', '.join(signature.parameters) or 'no arguments'}"
                )
        return names

    def on_conflict(self, lock_phase: str) -> OnConflict | None:
        value, origin = self.read("on_conflict")
        if lock_phase == "queued_and_running" and value not in (None, "requeue", "wait"):
            raise ConfigurationError(
                f"{origin} is {value!r}, but a task with lock_phase='queued_and_running' takes "
                "'requeue' (its default) or 'wait' only: another policy would drop the very run "
                "that the publish has promised"
            )
        if lock_phase == "queued_and_running":
            return value or "requeue"
        if lock_phase == "lifetime" and value == "rerun":
            raise ConfigurationError(
                f"{origin} is 'rerun', which needs the message of each call; a task with "
                "lock_phase='lifetime' publishes no second one. Leave out one of the two"
            )
        if callable(value):
            _check_takes_no_self(value, origin, "the conflict")
        if value is None or callable(value) or value in POLICIES:
            return value  # type: ignore[no-any-return]
        raise ConfigurationError(
            f"{origin} must be one of {policy_names()}, or a callable that returns one of them, "
            f"not {value!r}" + _hint(str(value), POLICIES)
        )

    def one_of(self, attribute: str, default: str, *others: str) -> str:
        value, origin = self.read(attribute)
        if value is None:
            return default
        if value in (default, *others):
            return value  # type: ignore[no-any-return]
        *first, last = map(repr, (default, *others))
        raise ConfigurationError(
            f"{origin} must be {', '.join(first)} or {last}, not {value!r}"
            + _hint(str(value), (default, *others)).rstrip(".")
        )

    def seconds(self, attribute: str, may_be_zero: bool = False) -> float | None:
        value, origin = self.read(attribute)
        if value is None:
            return None
        number = value.total_seconds() if isinstance(value, timedelta) else value
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        is_in_range = is_number and math.isfinite(number) and number >= 0
        if not is_in_range or (number == 0 and not may_be_zero):
            least = "from 0 on" if may_be_zero else "above 0"
            raise ConfigurationError(
                f"{origin} must be a number of seconds {least}, or a timedelta, not {value!r}"
            )
        if number > LONGEST:
            raise ConfigurationError(f"{origin} must not be longer than a year; it is {value!r}")
        return float(number)


def _body_signature(task_class: Any) -> inspect.Signature:
    run = inspect.getattr_static(task_class, "run")
    is_bound = not isinstance(run, staticmethod)
    signature = inspect.signature(getattr(run, "__func__", run))
    parameters = list(signature.parameters.values())[1 if is_bound else 0 :]
    return signature.replace(parameters=[_with_own_default(each) for each in parameters])


def _with_own_default(parameter: inspect.Parameter) -> inspect.Parameter:
    """A body that mutates its default must not change the keys of later calls."""
    if not isinstance(parameter.default, (list, dict, set)):
        return parameter  # and a sentinel must stay the one that lock_args compares with
    try:
        return parameter.replace(default=copy.deepcopy(parameter.default))
    except Exception:
        return parameter  # what cannot be copied has no canonical form either


def _check_takes_no_self(value: Any, origin: str, what: str) -> None:
    try:
        first = next(iter(inspect.signature(value).parameters), None)
    except ValueError:  # some built-in functions do not tell
        return
    if first == "self":
        raise ConfigurationError(f"{origin} is called with {what} and nothing else: drop 'self'")


def _check_every_argument_counts(
    task_name: str, lock_args: LockArgs, signature: inspect.Signature
) -> None:
    if lock_args is None:
        return
    if callable(lock_args):
        left_out = "some arguments (lock_args is a callable)"
    else:
        left_out = ", ".join(name for name in signature.parameters if name not in lock_args)
    if left_out:
        raise ConfigurationError(
            f"The lock of task {task_name} leaves out {left_out}: different calls share it, and to "
            f"skip one of them would lose it. Say on_conflict, on the task or with the setting "
            f"singleton_on_conflict: one of {policy_names()}"
        )


def _check_settings(app: Any) -> None:
    is_enabled(app)
    namespace = f"{app.namespace}_" if app.namespace else ""
    for key in app.conf:
        name = str(key)
        if namespace and name.startswith(namespace):
            name = name[len(namespace) :].lower()
        if name.startswith("singleton_") and name not in SETTINGS:
            raise ConfigurationError(
                f"There is no setting {key}"
                + _hint(name, SETTINGS)
                + f" Known: {', '.join(SETTINGS)}"
            )


def _check_attribute_names(task_class: Any) -> None:
    for owner in task_class.__mro__:
        if owner.__module__.partition(".")[0] in ("celery", "celery_singleton_lock", "builtins"):
            continue
        for name in vars(owner):
            if name in ATTRIBUTES:
                continue
            near = get_close_matches(
                name, ("on_conflict", "on_lease_lost", "wait_timeout"), cutoff=0.8
            )
            if name.startswith("lock_") or near:
                raise ConfigurationError(
                    f"Task {task_class.name}: there is no option {name}"
                    + _hint(name, ATTRIBUTES)
                    + f" Known: {', '.join(ATTRIBUTES)}"
                )


def _hint(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f". Did you mean {near[0]}?" if near else "."
