"""Real Celery processes for the examples: started together, and gone together.

With all that they were: also the keys that they leave on a server that is not their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import redis

from redis_server import END_WITH_PARENT

EXAMPLES = Path(__file__).parent

#: Seconds that a worker may take to be ready: many slots on a busy machine take their time.
READY_WITHIN = 60.0
#: Seconds that a process may take to end what it is doing before it is killed.
STOPPED_WITHIN = 10.0


_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_noted: list[int] = []


class FleetError(RuntimeError):
    """A process of the fleet died or is not ready; the message shows the end of its log."""


class _Member(NamedTuple):
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Fleet:
    """Workers and beats of one Celery app, each a process of its own.

    Leaves nothing behind, however its ``with`` block ends: in good order after a good end, killed
    after an error or a Ctrl-C. On Linux they also die when the program that started them is killed.

    Args:
        app: The Celery app; the processes find it in its module, named by ``app.main``.
        name: Ends the workers' node names, so that two fleets on one broker stay apart.
    """

    def __init__(self, app: Any, name: str) -> None:
        self._app = app
        self._name = name
        self._members: list[_Member] = []
        self._folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))

    def start_worker(self, name: str, slots: int, queue: str) -> None:
        """Start a worker with ``slots`` pool processes; see :meth:`wait_until_ready`."""
        # What is left out here talks to other workers; it only delays the start.
        quiet = ("--without-mingle", "--without-gossip", "--without-heartbeat")
        options = ("--pool=prefork", f"--concurrency={slots}", f"--queues={queue}", *quiet)
        named = (f"--hostname={self._node(name)}", "--loglevel=WARNING")
        self._start(name, "worker", *named, *options)

    def start_beat(self) -> None:
        """Start the process that fires ``beat_schedule``."""
        schedule = self._folder / "beat-schedule"
        schedule.unlink(missing_ok=True)  # it remembers when each entry was fired last
        self._start("beat", "beat", f"--schedule={schedule}", "--pidfile=", "--loglevel=WARNING")

    def wait_until_ready(self) -> None:
        """Return when every worker answers a ping.

        Raises:
            FleetError: One of them died, or did not answer in time.
        """
        missing = {self._node(each.name) for each in self._members if each.name != "beat"}
        deadline = time.monotonic() + READY_WITHIN
        while missing:
            self.check()
            if time.monotonic() > deadline:
                raise FleetError(f"{', '.join(sorted(missing))}: not ready in {READY_WITHIN:g} s")
            # The answer comes as soon as all have answered; the limit is for those that start.
            for reply in self._app.control.ping(destination=sorted(missing), timeout=0.5):
                missing -= set(reply)

    def check(self) -> None:
        """Return if all that was started still runs, and nobody wants it to end.

        Raises:
            FleetError: A process is gone.
            SystemExit: See :func:`end_if_asked`.
        """
        end_if_asked()
        for member in self._members:
            if member.process.poll() is not None:
                code = member.process.returncode
                raise FleetError(f"{member.name} ended with {code}. Its log ends:\n{_tail(member)}")

    def stop(self, *names: str, within: float = STOPPED_WITHIN) -> None:
        """End the named processes, or all: bodies may finish, what takes too long is killed."""
        leaving = [member for member in self._members if not names or member.name in names]
        deadline = time.monotonic() + within
        for member in leaving:
            member.process.terminate()
        for member in leaving:
            with suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.0, deadline - time.monotonic()))
        self._kill(leaving)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self._kill(list(self._members))  # nobody waits for what they are doing
        shutil.rmtree(self._folder, ignore_errors=True)

    def _node(self, name: str) -> str:
        return f"{name}@{self._name}"

    def _start(self, name: str, *command: str) -> None:
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "--quiet", "-A", self._app.main, *command],
                # TMPDIR: a worker that is killed leaves a folder there, which goes with ours.
                env={**os.environ, "PYTHONPATH": _python_path(), "TMPDIR": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A Ctrl-C is for the program, which then ends the fleet. The session is also the
                # process group by which a worker is killed together with its pool.
                start_new_session=True,
                preexec_fn=END_WITH_PARENT,
            )
        self._members.append(_Member(name, process, log))

    def _kill(self, leaving: list[_Member]) -> None:
        for member in leaving:
            # The group: a worker that was killed leaves its pool processes in it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(member.process.pid, signal.SIGKILL)
            member.process.wait()
            self._members.remove(member)


@contextmanager
def own_keys(url: str, prefix: str) -> Iterator[None]:
    """Remove every key that begins with ``prefix`` when the ``with`` block ends.

    Raises:
        FleetError: ``url`` makes no sense.
        RedisError: The server does not answer, or does not let us in.
    """
    try:
        client = redis.Redis.from_url(url)
    except ValueError as error:
        raise FleetError(f"The URL of the Redis server makes no sense: {error}") from None
    with client:
        client.ping()
        try:
            yield
        finally:
            for key in client.scan_iter(match=f"{prefix}*", count=1000):
                client.delete(key)


def note_signals() -> None:
    """From now on, Ctrl-C, a plain kill and a closed terminal end the program in good order.

    That is at the next :func:`end_if_asked`, a moment later, and not wherever the program is: an
    exception that a signal handler raises is lost if it happens to come in a ``__del__``.
    Whoever asks twice before that is served at once.
    """
    for number in _ENDINGS:
        signal.signal(number, _note)


def end_if_asked() -> None:
    """Leave through all ``with`` blocks if a signal has come; what then cleans up is let alone.

    Without a traceback, and with the exit code that shells expect: 130 after Ctrl-C.
    """
    if _noted:
        for number in _ENDINGS:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + _noted[0])


def _note(number: int, _frame: FrameType | None) -> None:
    _noted.append(number)
    if len(_noted) > 1:
        end_if_asked()


def _python_path() -> str:
    """The examples first: the processes import them from wherever the program was started."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(EXAMPLES), given] if given else [str(EXAMPLES)])


def _tail(member: _Member, lines: int = 20) -> str:
    return "\n".join(member.log.read_text("utf-8", "replace").splitlines()[-lines:])
