"""From a call to its lock key: bound arguments, canonical form, digest. Pure.

The key of ``shop.buy("anvil")`` looks like this::

    singleton:{23}:1:shop.buy:0d5f…e1
    │         │    │ │        └ digest of the lock name and the values that count (blake2b)
    │         │    │ └ lock name, in clear, so that people can scan for a task
    │         │    └ version of this format
    │         └ bucket: the Redis Cluster hash tag, one of a constant number
    └ key prefix

Two calls have one key exactly when Celery's JSON serializer makes the same message of them.
JSON merges a tuple with a list, the mapping keys ``1`` and ``"1"``, and a ``str`` enum with
its value, so keys merge them too; ``1``, ``1.0``, ``True`` and ``"1"`` stay apart. What only
pickle or YAML can send (sets, timedeltas, plain enums) has a key as well.

**This format is final.** Workers of two versions share locks during a rolling deploy; to
change a key is to lose the exclusion. ``tests/unit/golden_keys.json`` holds it in place.
"""

from __future__ import annotations

import inspect
import json
import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from typing import Any, Union
from uuid import UUID

from kombu.utils.json import JSONEncoder as KombuEncoder
from kombu.utils.json import object_hook as kombu_decode

from .errors import ConfigurationError, KeyDerivationError

FORMAT_VERSION = 1
BUCKETS = 64

#: The values that count: by parameter name, or in the order named by ``lock_args``.
CountedValues = Union[Mapping[str, Any], Sequence[Any]]
LockArgs = Union[None, Sequence[str], Callable[..., Any]]

_ENVELOPE = {"__type__", "__value__"}
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


class _NoCanonicalFormError(Exception):
    """Strictly private: why a value has no canonical form, before the argument is known."""


def check_key_prefix(prefix: str, origin: str) -> str:
    """Return ``prefix``, unless it would move locks away from their bucket's cluster slot."""
    if "{" in prefix or "}" in prefix:
        raise ConfigurationError(
            f"{origin} is {prefix!r}, but a key prefix must not contain braces: Redis Cluster "
            "would take them for the hash tag. Choose a prefix without."
        )
    return prefix


def probe_key(prefix: str) -> str:
    """A key that no call has, to try a store with."""
    return f"{prefix}{{0}}:check:{secrets.token_hex(8)}"


def lock_key(prefix: str, lock_name: str, canonical_values: Any) -> str:
    """The lock key of values that :func:`canonical` has already put in form."""
    text = _encode([lock_name, canonical_values])
    digest = blake2b(text.encode("ascii"), digest_size=20).hexdigest()
    bucket = int(digest[:4], 16) % BUCKETS
    return f"{prefix}{{{bucket}}}:{FORMAT_VERSION}:{lock_name}:{digest}"


def call_key(
    prefix: str,
    lock_name: str,
    task_name: str,
    signature: inspect.Signature,
    lock_args: LockArgs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str:
    """The lock key of one call of a task.

    Args:
        prefix: Key prefix of the app.
        lock_name: Whose lock it is.
        task_name: For error messages only.
        signature: The body's signature, without a bound ``self``.
        lock_args: Which arguments count: ``None`` for all, names, or a callable that is given
            the call's arguments (defaults filled in, positionally where possible) and returns
            one value, or a tuple of several.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        TypeError: The arguments do not fit the signature, so the body could not run either.
        KeyDerivationError: An argument has no canonical form.
    """
    call = _Call(task_name, signature, args, kwargs)
    try:
        return lock_key(prefix, lock_name, call.counted_values(lock_args))
    except ValueError:  # Python refuses to spell an integer of more than 4,300 digits
        raise KeyDerivationError(
            task_name, ", ".join(signature.parameters), "holds an integer that JSON cannot spell"
        ) from None


def canonical(value: Any) -> Any:
    """The JSON-ready form that every spelling of one value shares.

    Typed values become ``{"__type__": …, "__value__": …}``. No plain mapping can look like
    that: Celery's JSON turns one that does into the typed value, and so does this function.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        return _canonical_mapping(value)
    return _canonical_object(value)


def beside(key: str, what: str) -> str:
    """Another key for the same lock, in its bucket, and not to be taken for a lock's."""
    prefix_and_tag, _, rest = key.partition("}")
    return f"{prefix_and_tag}}}:{what}{rest}"


def queued_key(key: str) -> str:
    """Where a run that waits in its queue is noted, beside the lock that it is to have."""
    return beside(key, "queued")


def call_digest(
    task_name: str,
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str:
    """A digest of the task and all arguments of a call, whatever its lock leaves out.

    Raises as :func:`call_key` does.
    """
    key = call_key("", task_name, task_name, signature, None, args, kwargs)
    return key.rpartition(":")[2]


class _Call:
    """Strictly private: the arguments of one call, by the names of their parameters."""

    def __init__(
        self,
        task_name: str,
        signature: inspect.Signature,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._task_name = task_name
        self._bound = signature.bind(*args, **kwargs)
        self._given = set(self._bound.arguments)
        self._bound.apply_defaults()

    def counted_values(self, lock_args: LockArgs) -> CountedValues:
        """The canonical forms of the values that count."""
        if lock_args is None:
            return {name: self._form(name, value) for name, value in self._bound.arguments.items()}
        if callable(lock_args):
            return [self._form("lock_args(...)", value) for value in self._chosen(lock_args)]
        return [self._form(name, self._argument(name)) for name in lock_args]

    def _form(self, argument: str, value: Any) -> Any:
        try:
            return canonical(value)
        except _NoCanonicalFormError as error:
            if argument in self._bound.arguments and argument not in self._given:
                return _typed("default", None)  # a sentinel, say: never sent, and one of its kind
            reason = str(error)
        except RecursionError:
            reason = "contains itself, or is nested too deeply"
        raise KeyDerivationError(self._task_name, argument, reason)

    def _argument(self, name: str) -> Any:
        arguments = self._bound.arguments
        if name in arguments:
            return arguments[name]
        for parameter in self._bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD and name in arguments[parameter.name]:
                return arguments[parameter.name][name]
        raise KeyDerivationError(
            self._task_name, name, "is named by lock_args, but the call does not give it"
        )

    def _chosen(self, lock_args: Callable[..., Any]) -> tuple[Any, ...]:
        try:
            chosen = lock_args(*self._bound.args, **self._bound.kwargs)
        except Exception as error:
            # Without the error itself: its message may quote an argument.
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise KeyDerivationError(
                self._task_name,
                "lock_args(...)",
                f"raised {_type_name(error)} at {place.filename}:{place.lineno}",
            ) from None
        return chosen if isinstance(chosen, tuple) else (chosen,)


def _canonical_mapping(mapping: Mapping[Any, Any]) -> Any:
    if mapping.keys() == _ENVELOPE:
        return canonical(_decoded(mapping))
    return {_member_name(key): canonical(value) for key, value in mapping.items()}


def _decoded(envelope: Mapping[Any, Any]) -> Any:
    try:
        return kombu_decode(dict(envelope))
    except Exception:
        raise _NoCanonicalFormError(
            "holds a mapping with the keys __type__ and __value__ that Celery's JSON "
            "serializer could not read back"
        ) from None


def _member_name(key: Any) -> str:
    if isinstance(key, str):
        # JSON joins two escaped surrogates into one character; so must the order of the keys.
        return (
            key
            if key.isascii()
            else key.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        )
    if key is None or isinstance(key, (int, float)):
        return json.dumps(key)
    raise _NoCanonicalFormError(
        f"holds a mapping with a key of type {_type_name(key)}, which JSON cannot send; "
        "let lock_args name other arguments, or return a plain value for it"
    )


def _typed(marker: Any, value: Any) -> dict[str, Any]:
    return {"__type__": marker, "__value__": value}


def _canonical_object(value: Any) -> Any:
    reducer = getattr(value, "__json__", None)
    if reducer is not None:
        return canonical(_reduced(value, reducer))
    for kind, form in _FORMS:
        if isinstance(value, kind):
            return form(value)
    try:
        sent = KombuEncoder().default(value)  # type: ignore[no-untyped-call]
    except TypeError:
        raise _NoCanonicalFormError(
            f"holds a value of type {_type_name(value)}, which has no canonical form; "
            "pass plain data, or let lock_args name other arguments or return a plain value for it"
        ) from None
    if isinstance(sent, dict) and sent.keys() == _ENVELOPE:
        # In a list, so that no type that users register can be taken for one of ours.
        return _typed([sent["__type__"]], canonical(sent["__value__"]))
    return canonical(sent)


def _reduced(value: Any, reducer: Callable[[], Any]) -> Any:
    try:
        return reducer()
    except Exception as error:
        raise _NoCanonicalFormError(
            f"holds a value of type {_type_name(value)}, whose __json__ raised {_type_name(error)}"
        ) from None


def _members_in_order(members: Any) -> list[Any]:
    return sorted((canonical(member) for member in members), key=_encode)


#: Our own spelling of what Celery can send, so that a change of kombu's cannot move a key.
#: datetime stands before date, its base class. The unbound methods are what kombu calls too.
_FORMS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (datetime, lambda value: _typed("datetime", datetime.isoformat(value))),
    (date, lambda value: _typed("date", value.isoformat())),
    (time, lambda value: _typed("time", value.isoformat())),
    (timedelta, lambda value: _typed("timedelta", [value.days, value.seconds, value.microseconds])),
    (Decimal, lambda value: _typed("decimal", str(value))),
    (UUID, lambda value: _typed("uuid", value.hex)),
    (bytes, lambda value: _typed("bytes", value.hex())),
    (frozenset, lambda value: _typed("frozenset", _members_in_order(value))),
    (set, lambda value: _typed("set", _members_in_order(value))),
    (
        Enum,
        lambda value: _typed(
            "enum",
            [f"{type(value).__module__}.{type(value).__qualname__}", canonical(value.value)],
        ),
    ),
)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
