"""A Redis for tests: there, or a reason why not."""

from __future__ import annotations

import os

import pytest

from redis_server import RedisServer, RedisServerNotFound


def redis_or_skip(*options: str) -> RedisServer:
    """A private server; without one, a failure in CI and a skip with its reason elsewhere."""
    try:
        return RedisServer(*options)
    except RedisServerNotFound as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
