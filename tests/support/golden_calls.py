"""Calls whose lock keys are on record in ``tests/unit/golden_keys.json``.

Run as a program, it prints the keys as this Python computes them.
"""

from __future__ import annotations

import inspect
import json
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any
from uuid import UUID

from celery_singleton_lock.keys import call_key


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(str, Enum):
    SMALL = "small"


class Level(IntEnum):
    LOW = 1


def key(
    function: Any, *args: Any, lock_args: Any = None, name: str = "shop.buy", **kwargs: Any
) -> str:
    """The lock key of ``function(*args, **kwargs)``."""
    signature = inspect.signature(function)
    return call_key("singleton:", name, "shop.buy", signature, lock_args, args, kwargs)


def of_value(value: Any) -> str:
    """The lock key of a call with one argument."""
    return key(lambda value: None, value)


def f(a, b=None):
    """A task with two parameters."""


def decrement(order_id, sku, quantity=1):
    """A task of which only one argument names the thing that is locked."""


def every_kind(a, /, b, c=3, *more, d, e="five", **rest):
    """One parameter of each kind, some with defaults."""


#: name → call. A key that changes here excludes nobody during a rolling deploy.
GOLDEN_CALLS: dict[str, Any] = {
    "no arguments": lambda: key(lambda: None),
    "positional": lambda: key(f, 1, "two"),
    "default": lambda: key(f, 1),
    "every kind": lambda: key(every_kind, 1, 2, 3, 4, d=5, x=[6]),
    "lock_args": lambda: key(decrement, 1, "anvil", lock_args=("sku",)),
    "lock_args empty": lambda: key(decrement, 1, "anvil", lock_args=()),
    "text": lambda: of_value("Grüße, 世界 😀 \x00"),
    "numbers": lambda: of_value([0, -1, 2**70, 1.5, 1e300, -0.0, float("inf"), True, None]),
    "mapping": lambda: of_value({"b": 1, "a": {"z": [], 1: None, None: 2, False: 3, 1.5: 4}}),
    "bytes": lambda: of_value([b"", b"\xff\x00"]),
    "datetime": lambda: of_value(datetime(2026, 11, 20, 21, 39, 36, 7)),
    "aware datetime": lambda: of_value(
        datetime(2026, 11, 20, tzinfo=timezone(timedelta(hours=-5, minutes=30)))
    ),
    "date": lambda: of_value(date(2026, 11, 20)),
    "time": lambda: of_value(time(21, 39, 36, 7)),
    "timedelta": lambda: of_value(timedelta(days=-1, microseconds=1)),
    "uuid": lambda: of_value(UUID(int=2**127 + 1)),
    "decimal": lambda: of_value([Decimal("1.10"), Decimal("1E+2"), Decimal("-0")]),
    "sets": lambda: of_value([{3, 1, 2, "b", "a"}, frozenset({2.5})]),
    "enums": lambda: of_value([Colour.RED, Size.SMALL, Level.LOW]),
}


def golden() -> dict[str, str]:
    """All of them, as computed now."""
    return {name: call() for name, call in GOLDEN_CALLS.items()}


if __name__ == "__main__":
    # As when it is imported: the module's name is part of an enum's key.
    import golden_calls

    print(json.dumps(golden_calls.golden(), indent=1))
