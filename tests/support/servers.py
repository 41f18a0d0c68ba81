"""What tests need and may not find: a Redis, a RabbitMQ, a library."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from rabbitmq_server import RabbitmqServer, RabbitmqServerNotFound
from redis_server import RedisServer, RedisServerNotFound


def redis_or_skip(*options: str) -> RedisServer:
    """A private server, or :func:`missing`."""
    try:
        return RedisServer(*options)
    except RedisServerNotFound as error:
        missing(str(error))


def rabbitmq_or_skip() -> RabbitmqServer:
    """A private node, or :func:`missing`."""
    try:
        return RabbitmqServer()
    except RabbitmqServerNotFound as error:
        missing(str(error))


def missing(reason: str) -> NoReturn:
    """Skip on a laptop; in CI, what is missing is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
