"""A RabbitMQ for tests: named by ``SINGLETON_RABBITMQ_URL``, or started and ended with its user.

A node that is started here shares nothing with a RabbitMQ service of this machine, not even epmd.
It listens on free loopback ports, and ends with the ``with`` block, at interpreter exit, and (on
Linux) even when its user is killed.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import amqp
from kombu import Connection

from redis_server import END_WITH_PARENT

ENVIRONMENT_VARIABLE = "SINGLETON_RABBITMQ_URL"
#: Before PATH: what Debian and Fedora put there runs as the service's own user, in its folders.
SCRIPTS = "/usr/lib/rabbitmq/bin"
#: Seconds for a start. It takes 3 to 6; a machine may be busy.
LONGEST_START = 60.0

NOT_FOUND = (
    f"No RabbitMQ found. Set {ENVIRONMENT_VARIABLE} to the URL of one, or install one "
    "(apt-get install --no-install-recommends rabbitmq-server, brew install rabbitmq)."
)


class RabbitmqServerNotFound(RuntimeError):  # noqa: N818  # says what it is, as FileNotFoundError does
    """There is no server, and the message says what to install."""


class RabbitmqServer:
    """A running RabbitMQ node of our own, with no plugins.

    Raises:
        RabbitmqServerNotFound: There is none to start.
    """

    def __init__(self) -> None:
        path = os.pathsep.join([SCRIPTS, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        server, epmd = (shutil.which(name, path=path) for name in ("rabbitmq-server", "epmd"))
        if not server or not epmd:
            raise RabbitmqServerNotFound(NOT_FOUND)
        self._program = Path(server)
        self._folder = Path(tempfile.mkdtemp(prefix="singleton-rabbitmq-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        atexit.register(self.stop)
        for _ in range(3):  # another process may take a port between the look and the start
            self.port, epmd_port, node_port = _free_ports(3)
            self._settings = self._environment(epmd_port, node_port)
            # First, and waited for: an epmd that the node starts would outlive it.
            self._start([epmd, "-address", "127.0.0.1", "-port", str(epmd_port)])
            if not self._comes_up(_accepts, epmd_port):
                continue
            self._start([server])
            if self._comes_up(_answers, self.port):
                return
        log = self._log.read_text("utf-8", "replace")[-2000:]
        self.stop()
        raise RuntimeError(f"{server} does not start:\n{log}")

    @property
    def url(self) -> str:
        """The address, for Celery."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def messages(self, queue: str) -> int:
        """How many there are, including those that clients have not acknowledged."""
        lines = self._control("list_queues", "name", "messages").splitlines()
        return int(dict(line.split("\t") for line in lines)[queue])

    def close_connections(self) -> None:
        """Close all that clients have; what they have not acknowledged is delivered again."""
        self._control("close_all_connections", "closed by a test")

    def stop(self) -> None:
        """End the node with its epmd, and remove what they left. Does nothing the second time."""
        atexit.unregister(self.stop)
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RabbitmqServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _environment(self, epmd_port: int, node_port: int) -> dict[str, str]:
        """Everything that would lie in /etc or /var, or be shared, said anew."""
        files = {
            "rabbitmq.conf": f"listeners.tcp.1 = 127.0.0.1:{self.port}\n",
            "advanced.config": "[].\n",
            "enabled_plugins": "[].\n",
            "env.conf": "",
        }
        for name, text in files.items():
            (self._folder / name).write_text(text)
        folder = f"{self._folder}{os.sep}"
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        others = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))}
        return {
            **others,
            "HOME": str(self._folder),  # of the cookie
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"singleton-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(node_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            "RABBITMQ_CTL_ERL_ARGS": loopback,
            "RABBITMQ_CONF_ENV_FILE": f"{folder}env.conf",
            "RABBITMQ_CONFIG_FILE": f"{folder}rabbitmq.conf",
            "RABBITMQ_CONFIG_FILES": f"{folder}conf.d",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}data",
            "RABBITMQ_LOG_BASE": f"{folder}logs",
            "RABBITMQ_LOGS": "-",
            # Makes the script become the server, so that what ends the one ends the other.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _control(self, *words: str) -> str:
        command = [str(self._program.with_name("rabbitmqctl")), "--quiet", *words]
        return subprocess.run(
            command, env=self._settings, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def _start(self, command: list[str]) -> None:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self._settings,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the user of the server
                preexec_fn=END_WITH_PARENT,
            )
        self._processes.append(process)

    def _comes_up(self, is_up: Callable[[int], bool], port: int) -> bool:
        newest = self._processes[-1]
        give_up_at = time.monotonic() + LONGEST_START
        while newest.poll() is None and time.monotonic() < give_up_at:
            if is_up(port):
                return True
            time.sleep(0.05)
        self._kill()
        return False

    def _kill(self) -> None:
        while self._processes:
            process = self._processes.pop()
            process.kill()
            process.wait()


class GivenRabbitmq:
    """The RabbitMQ that the environment names.

    Args:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def messages(self, queue: str) -> int:
        """How many there are; a client is not told of those that others have not acknowledged."""
        with Connection(self.url) as connection, connection.channel() as channel:
            return channel.queue_declare(queue, passive=True).message_count


def given_url() -> str | None:
    """The URL of a server that the environment names, if any."""
    return os.environ.get(ENVIRONMENT_VARIABLE)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all at once, so that they differ
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _answers(port: int) -> bool:
    if not _accepts(port):
        return False
    connection = amqp.Connection(f"127.0.0.1:{port}", connect_timeout=1)
    try:
        connection.connect()
        connection.close()
    except (OSError, amqp.AMQPError):
        return False
    return True
