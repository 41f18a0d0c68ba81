"""pytest-celery's nodes as processes of this machine: no Docker is needed, and none is asked.

A node asks its container for a handful of things: id, name, status, ready, logs, kill, restart,
reload, teardown, celeryconfig, exec_run. These containers answer from a process. They derive from
pytest-celery's own, so that its nodes, clusters and setups take them, but never run the
``__init__`` of its Docker wrapper.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from pytest_celery import CeleryWorkerContainer, RedisContainer
from pytest_docker_tools.exceptions import ContainerFailed

import worker_app
from redis_server import RedisServer
from waiting import DEADLINE, wait_until

SUPPORT = Path(__file__).parent

# Loaded here and not in the child: between fork and exec nobody knows which locks are held.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class LocalProcess:
    """What a node asks of its container; mixed in before one of pytest-celery's containers.

    Args:
        name: For people, and for the log of a failed test.
    """

    #: The process, once started.
    process: subprocess.Popen[bytes]

    def __init__(self, name: str) -> None:
        self.id = uuid4().hex  # type: ignore[misc]  # properties of the Docker wrapper
        self.name = name  # type: ignore[misc]

    id = name = ""  # plain attributes, in place of those properties

    @property
    def status(self) -> str:
        """``"running"`` or ``"exited"``, as Docker says it."""
        return "running" if self.process.poll() is None else "exited"

    def reload(self) -> None:
        """Do nothing: ``status`` always looks."""

    def kill(self, signal: str | int = "SIGKILL") -> None:  # noqa: A002  # Docker's name
        """Send a signal to the main process; SIGKILL to all processes at once, and wait for it."""
        number = _signal_number(signal)
        if number != _signal_number("SIGKILL"):
            self.process.send_signal(number)
            return
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.process.wait()
