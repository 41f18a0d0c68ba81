"""Random kills by a plan. One seed makes one plan, though never twice the same interleaving."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import psutil
import redis
from kombu import Connection
from pytest_celery import CeleryTestWorker

from history import History, Run
from waiting import wait_until

T = TypeVar("T")

#: What Celery says when a worker ends because a child of it was killed while it started.
GAVE_UP = "Could not start worker processes"


class Step(NamedTuple):
    """One planned kill.

    Attributes:
        delay: Seconds since the one before.
        target: ``"worker"``: a whole one; ``"body"``: a child that runs one; ``"child"``: any.
        pick: Which one of those that are there: from 0 to below 1.
    """

    delay: float
    target: str
    pick: float


def plan(seed: int, child_kills: int, worker_kills: int) -> list[Step]:
    """So many kills of both kinds in random order; most of the children run a body."""
    chance = random.Random(seed)
    at_random = child_kills // 4
    targets = ["child"] * at_random + ["body"] * (child_kills - at_random)
    targets += ["worker"] * worker_kills
    chance.shuffle(targets)
    return [Step(chance.uniform(0.1, 1.5), target, chance.random()) for target in targets]


class Kill(NamedTuple):
    """What one kill ended.

    Attributes:
        is_of_worker: As planned.
        pids: The processes.
        began: Just before it.
        done: When all of the processes were seen to be dead.
    """

    is_of_worker: bool
    pids: tuple[int, ...]
    began: float
    done: float

    def ended(self, run: Run) -> bool:
        """Whether it is one of these processes that did not come to the end of ``run``."""
        return run.pid in self.pids and run.start <= self.done and not run.is_over


class Broker:
    """One queue of kombu's, alone in a Redis database.

    Args:
        queue: Its name, which is also its key.
        connection: kombu's, with the ``visibility_timeout`` of the workers.
        client: To the same database.
    """

    def __init__(self, queue: str, connection: Connection, client: redis.Redis) -> None:
        self._queue = queue
        self._connection = connection
        self._client = client

    def restore_overdue(self) -> None:
        """Put back what was delivered and not acknowledged in time.

        Workers do that too, but only every 100 s, and kombu before 5.7 has no setting for it.
        """
        self._connection.default_channel.qos.restore_visible(num=None, interval=1)

    def task_ids(self) -> set[str]:
        """Of all messages that are not acknowledged, be they delivered or not."""
        with self._client.pipeline() as pipeline:
            pipeline.lrange(self._queue, 0, -1).hvals("unacked")
            return _task_ids(*pipeline.execute())

    def cut_off(self, process: psutil.Process, task_ids: set[str]) -> bool:
        """Close the connections from ``process``, if the messages of these tasks are all here.

        If not, or if messages come and go just now, does nothing and returns False.
        """
        own_port = self._client.get_connection_kwargs()["port"]
        ports = [
            each.laddr.port
            for each in process.net_connections("tcp")
            if each.raddr and each.raddr.port == own_port
        ]
        with self._client.pipeline() as pipeline:
            pipeline.watch(self._queue)
            if task_ids - _task_ids(pipeline.lrange(self._queue, 0, -1), pipeline.hvals("unacked")):
                return False
            # Of a run that was put back, the delivery that is not acknowledged yet says nothing of
            # the new message: see that none has been handed out.
            if any(_has_an_answer(each, ports) for each in pipeline.client_list()):
                return False
            pipeline.multi()
            for port in ports:
                pipeline.client_kill_filter(addr=f"127.0.0.1:{port}")
            try:
                pipeline.execute()
            except redis.WatchError:
                return False
        return True


def _has_an_answer(client: Mapping[str, str], ports: Collection[int]) -> bool:
    """Whether Redis has answered one of these connections, which asked for the next message."""
    is_one_of_them = int(client["addr"].rpartition(":")[2]) in ports
    return is_one_of_them and client["cmd"] == "brpop" and "b" not in client["flags"]


def _task_ids(queued: Iterable[str], unacknowledged: Iterable[str]) -> set[str]:
    messages = [json.loads(each) for each in queued]
    messages += [json.loads(each)[0] for each in unacknowledged]
    return {message["headers"]["id"] for message in messages}


class Load:
    """Tasks for a few labels, published as fast as they get done.

    Args:
        seed: For which label each is, and how long it runs.
        labels: Their labels.
        publish: Called with a label and seconds; returns the task id.
        history: Where the tasks note their effects.
    """

    def __init__(
        self,
        seed: int,
        labels: Sequence[str],
        publish: Callable[[str, float], str],
        history: History,
    ) -> None:
        self._chance = random.Random(seed)
        self._labels = labels
        self._publish = publish
        self._history = history
        self.task_ids: set[str] = set()

    def __str__(self) -> str:
        return f"{len(self.task_ids)} tasks, {len(self.undone())} of them not done"

    def top_up(self, backlog: int, long: float) -> None:
        """Publish until so many tasks are not done; each sixteenth takes ``long`` seconds."""
        for _ in range(backlog - len(self.undone())):
            is_long = len(self.task_ids) % 16 == 0
            seconds = long if is_long else self._chance.uniform(0.05, 0.6)
            self.task_ids.add(self._publish(self._chance.choice(self._labels), seconds))

    def runs(self) -> list[Run]:
        """What the bodies wrote down."""
        return self._history.runs(*self._labels)

    def undone(self) -> set[str]:
        """The tasks whose effect is not there."""
        return self.task_ids - self._history.effects(*self._labels)


class Killer:
    """Carries out a plan.

    Args:
        workers: All of them on the queue of ``broker``; a killed one is started again.
        broker: Their broker.
        load: Whose tasks they run.

    Attributes:
        kills: What was done.
    """

    def __init__(self, workers: Sequence[CeleryTestWorker], broker: Broker, load: Load) -> None:
        self._workers = workers
        self._broker = broker
        self._load = load
        self.kills: list[Kill] = []

    def runs(self) -> list[Run]:
        """All runs of the load; those that wrote down no end have that of their process.

        Which is when its kill began: before that was seen to be done, its lock can have been free
        and the next run have started.
        """
        return [run if run.is_over else self._ended(run) for run in self._load.runs()]

    def carry_out(self, step: Step, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Kill what ``step`` says, as soon as there is one."""
        attempt, what = self._kill_child, f"a {step.target} is killed"
        if step.target == "worker":
            attempt, what = self._kill_worker, "each task that is not done has a message"
        wait_until(lambda: self.supervise() or meanwhile() or attempt(step), what)

    def supervise(self) -> None:
        """Do what goes on beside the workers: start what ended, put back what is overdue."""
        for worker in self._workers:
            if worker.container.status == "exited":
                assert GAVE_UP in worker.logs()[-1000:], f"{worker.hostname()} ended by itself"
                worker.container.start()
        self._broker.restore_overdue()

    def _ended(self, run: Run) -> Run:
        deaths = [max(kill.began, run.start) for kill in self.kills if kill.ended(run)]
        return run._replace(end=min(deaths, default=run.end))

    def _kill_child(self, step: Step) -> bool:
        pids = [pid for worker in self._workers for pid in _children(worker)]
        if step.target == "body":
            running = {run.pid for run in self.runs() if not run.is_over}
            pids = [pid for pid in pids if pid in running]
        if not pids:
            return False
        pid = _picked(pids, step.pick)
        self._kill(False, (pid,), lambda: os.kill(pid, signal.SIGKILL))
        return True

    def _kill_worker(self, step: Step) -> bool:
        workers = [worker for worker in self._workers if _children(worker)]
        if not workers:
            return False
        worker = _picked(workers, step.pick)
        main = psutil.Process(worker.container.process.pid)
        # From when Redis has handed out a message until the worker has noted it as delivered, it
        # is nowhere but in the worker: kombu would lose it. Such a moment is let pass.
        main.suspend()
        if not self._broker.cut_off(main, self._load.undone()):
            main.resume()
            return False
        # All of them: what is stopped forks no more.
        self._kill(True, (main.pid, *_children(worker)), worker.kill)
        worker.container.start()
        return True

    def _kill(self, is_of_worker: bool, pids: tuple[int, ...], kill: Callable[[], None]) -> None:
        began = time.monotonic()
        kill()
        wait_until(lambda: not any(map(_executes, pids)), "what was killed is dead")
        self.kills.append(Kill(is_of_worker, pids, began, time.monotonic()))


def _picked(candidates: Sequence[T], pick: float) -> T:
    return candidates[int(pick * len(candidates))]


def _children(worker: CeleryTestWorker) -> list[int]:
    """The living pool processes of a worker; none while it starts."""
    if worker.container.status == "exited":
        return []
    main = psutil.Process(worker.container.process.pid)
    return [child.pid for child in main.children() if _executes(child.pid)]


def _executes(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
