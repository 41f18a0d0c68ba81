"""pytest-celery's nodes as processes of this machine: no Docker is needed, and none is asked.

A node asks its container for a handful of things: id, name, status, ready, logs, kill, restart,
reload, teardown, celeryconfig, exec_run. The containers here answer from a process. They derive
from pytest-celery's own, so that its nodes, clusters and setups take them, but never run the
``__init__`` of its Docker wrapper.
"""

from __future__ import annotations

import json
import os
import shlex
import signal as signals
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
from redis_server import END_WITH_PARENT
from waiting import DEADLINE, wait_until


class LocalProcess:
    """What a node asks of its container; mixed in before one of pytest-celery's containers.

    Args:
        name: For people.

    Attributes:
        process: The main process, once started.
    """

    id = name = ""  # plain attributes, in place of the Docker wrapper's properties
    process: subprocess.Popen[bytes]

    def __init__(self, name: str) -> None:
        self.id = uuid4().hex
        self.name = name

    @property
    def status(self) -> str:
        """``"running"`` or ``"exited"``, as Docker says it."""
        return "running" if self.process.poll() is None else "exited"

    def ready(self) -> bool:
        """Whether it takes work."""
        return self.status == "running"

    def logs(self) -> str:
        """What it has printed so far."""
        return ""

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal to the main process; SIGKILL to its whole group, and wait for the end."""
        number = signals.Signals[signal] if isinstance(signal, str) else signal
        if number != signals.SIGKILL:
            self.process.send_signal(number)
        elif self.process.returncode is None:  # later, its id may be another's
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.process.wait()

    def reload(self) -> None:
        """Do nothing: ``status`` looks each time."""

    def teardown(self) -> None:
        """Leave the process to whoever started it."""


class LocalRedis(LocalProcess, RedisContainer):
    """One database of a Redis that somebody else starts and stops.

    Args:
        server: It has ``url(database)``; and ``process`` and ``restart()``, if it is ours.
        database: Its number.
    """

    def __init__(self, server: Any, database: int = 0) -> None:
        super().__init__(f"redis-{database}")
        self._server = server
        self.vhost = str(database)
        self.url = self.host_url = server.url(database)

    vhost = url = host_url = ""  # plain attributes, in place of properties

    @property
    def process(self) -> subprocess.Popen[bytes]:  # type: ignore[override]
        """The server's."""
        return self._server.process

    @property
    def status(self) -> str:
        """As of its process; what is not ours to start runs."""
        return super().status if hasattr(self._server, "process") else "running"

    @property
    def hostname(self) -> str:
        """The host in its URL."""
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        """The port in its URL."""
        return urlsplit(self.url).port or 6379

    def restart(self, timeout: float = DEADLINE) -> None:
        """End it and start an empty one on the same port."""
        self._server.restart()


class LocalWorker(LocalProcess, CeleryWorkerContainer):
    """A Celery worker on one of the tests' apps, with a queue of its own.

    Args:
        folder: Where it runs and keeps its log.
        settings: For its app.
        name: The first part of its node name.
        pool: As ``--pool``.
        concurrency: As ``--concurrency``.
        app_module: As ``--app``.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        name: str = "worker",
        pool: str = "prefork",
        concurrency: int = 2,
        app_module: str = worker_app.__name__,
    ) -> None:
        super().__init__(name)
        self._app_module = app_module
        self._folder = folder
        self._log = folder / "log"
        self._pool = pool
        self._concurrency = concurrency
        self._logged_before = 0
        self.celeryconfig = {"task_default_queue": f"{name}-{self.id[:12]}", **settings}
        self.start()

    celeryconfig: Mapping[str, Any] = {}  # a plain attribute, in place of a property

    def worker_name(self) -> str:
        """The part of its node name before the @."""
        return self.name

    def worker_queue(self) -> str:
        """The only queue that it takes messages from."""
        return self.celeryconfig["task_default_queue"]

    def command(self, *args: str, **_: Any) -> list[str]:
        """How it is started. What is left out talks to other workers and only delays the start."""
        return [
            *("celery", "-A", self._app_module, "worker", f"--loglevel={self.log_level()}"),
            *(f"--hostname={self.name}@{self.id[:12]}", f"--queues={self.worker_queue()}"),
            *(f"--pool={self._pool}", f"--concurrency={self._concurrency}", "--task-events"),
            *("--without-mingle", "--without-gossip", "--without-heartbeat"),
            *args,
        ]

    def start(self) -> None:
        """Start the process; ``ready()`` waits for it."""
        self._logged_before = len(self.logs())
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=self._environment(),
                cwd=self._folder,  # Celery puts it first on the path: not where the package lies
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # also the group by which it is killed with its pool
                preexec_fn=END_WITH_PARENT,
            )

    def ready(self) -> bool:
        """Wait until it takes work.

        Raises:
            ContainerFailed: It ended instead; pytest shows its log.
        """
        wait_until(
            lambda: self.status == "exited" or self.ready_prompt in self._logs_of_this_start(),
            f"{self.name} is ready",
        )
        if self.status == "exited":
            raise ContainerFailed(self, f"{self.name} ended with {self.process.returncode}")
        return True

    def logs(self) -> str:
        """All that it and its pool have printed, restarts included."""
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""

    def wait_for_exit(self, timeout: float = DEADLINE) -> int:
        """Wait for its end by itself, and return the exit code."""
        return self.process.wait(timeout)

    def restart(self, timeout: float = DEADLINE) -> None:
        """Stop it in good order, kill it if that takes too long, start it and wait for it."""
        self.kill("SIGTERM")
        with suppress(subprocess.TimeoutExpired):
            self.wait_for_exit(timeout)
        self.teardown()
        self.start()
        self.ready()

    def teardown(self) -> None:
        """Kill it with its pool: a stop in good order takes seconds, and nobody looks."""
        self.kill()

    def exec_run(self, cmd: str, **_: Any) -> tuple[int, bytes]:
        """Run a command in the worker's environment; the exit code and the output."""
        done = subprocess.run(
            shlex.split(cmd),
            env=self._environment(str(Path(self.utils_module().__file__).parent)),
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    def _logs_of_this_start(self) -> str:
        return self.logs()[self._logged_before :]

    def _environment(self, *python_path: str) -> dict[str, str]:
        support = str(Path(__file__).parent)
        return {
            **os.environ,
            "PATH": _path(str(Path(sys.executable).parent), os.environ.get("PATH")),
            "PYTHONPATH": _path(support, *python_path, os.environ.get("PYTHONPATH")),
            "TMPDIR": str(self._folder),  # a killed pool leaves things there
            worker_app.ENVIRONMENT_VARIABLE: json.dumps(self.celeryconfig),
        }


def _path(*entries: str | None) -> str:
    return os.pathsep.join(filter(None, entries))
