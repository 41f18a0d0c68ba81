"""Waiting for what other processes do: until a condition holds, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds until a wait gives up: long enough for a busy machine, below the default ttl of a lock,
#: so that no lock can be seen to go only because it ran out.
DEADLINE = 20.0


def wait_until(condition: Callable[[], T], what: str, timeout: float = DEADLINE) -> T:
    """Call ``condition`` until its answer is true, and return that answer.

    Raises:
        AssertionError: It was not within ``timeout`` seconds; the message says ``what``.
    """
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"After {timeout:g} s still not so: {what}"
        time.sleep(0.01)
    return answer
