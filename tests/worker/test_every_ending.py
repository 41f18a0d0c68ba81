"""R3 and R4 for every way in which a run can end: the lock leaves with it, not before, not after.

The table is ``tests/support/endings.py``. For each ending that a pool knows: the lock was the run's
for as long as its body lived, it is free within the stated time, no two bodies overlapped, and
message and result have come to what they should.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from uuid import uuid4

import pytest

import ending_tasks
from endings import BY_TTL, ENDINGS, NEVER_TAKEN, POOLS, Outcome
from lock_watch import LockWatch
from redis_server import RedisServer
from timeline import overlaps
from waiting import wait_until
from worker_app import open_gate

PREFIX = "singleton:"


class Stage:
    """A worker, one run that is to end, and all that can be seen of it."""

    def __init__(self, app, ending, pool, worker, broker, label, history, watch):
        self.worker = worker
        self.result = None
        self._task = getattr(ending_tasks, ending.outcome(pool).task or ending.task)
        self.is_late = self._task.acks_late
        self.pool, self.ending = pool, ending
        self._app, self._broker = app, broker
        self._label, self._history, self._watch = label, history, watch
        self._is_workers_end = ending.own_worker or ending.settings
        self._task_id = str(uuid4())

    def send(self):
        """Publish the run."""
        with self._app.connection(self._broker.url()) as connection:
            self.result = self._task.apply_async(
                (self._label, self.ending.how),
                queue=self.worker.worker_queue,
                task_id=self._task_id,
                connection=connection,
                **self.ending.options,
            )

    def start(self):
        """Publish it, and wait for its body, and for its message's early acknowledgement."""
        self.send()
        self._history.wait_for_starts(self._label)
        if "ignore the end" in self.ending.how:
            self.wait_for_log("From here on the end is ignored")
        if not self.is_late and self.pool != "solo":
            wait_until(lambda: self.messages() == 0, "the message is acknowledged")
        return self.runs()[0]

    def runs(self):
        """All runs; one that was killed has ended when it was last seen alive."""
        runs = self._history.runs(self._label)
        for run in runs:
            self._watch.follow(run.pid, run.start)
        return [
            run._replace(end=self._watch.last_alive(run.pid))
            if not run.is_over and self._watch.is_dead(run.pid)
            else run
            for run in runs
        ]

    def open_gate(self):
        open_gate(self._label)

    def wait_for_state(self, state):
        wait_until(lambda: self._state() == state, f"the state is {state}")

    def wait_for_log(self, *texts):
        wait_until(
            lambda: any(text in self.worker.logs() for text in texts), f"the log has {texts}"
        )

    def wait_for_death(self):
        wait_until(lambda: self.runs()[0].is_over, "the first run is over")

    def wait_for_copy(self):
        """Until the worker has the message a second time, if it can while a body runs."""
        if self.pool != "solo":
            received = f"[{self._task_id}] received"
            wait_until(lambda: self.worker.logs().count(received) >= 2, "it was delivered twice")

    def signal_worker(self, name):
        """To the main process alone."""
        os.kill(self.worker.container.process.pid, signal.Signals[name])

    def control(self, command, **arguments):
        """Send a remote control command, and wait for the answer."""
        host = self.worker.hostname()
        # With green threads a worker says that it is ready before it listens to this.
        ping = self._app.control.inspect([host], limit=1, timeout=1).ping
        wait_until(ping, "the worker listens")
        (reply,) = self._app.control.broadcast(
            command,
            arguments=arguments,
            destination=[host],
            reply=True,
            limit=1,
            timeout=10,
        )
        assert "error" not in str(reply)

    def revoke_and_wait(self):
        self.control("revoke", task_id=self._task_id)

    def redeliver(self):
        """As kombu does it for a message whose visibility timeout is over."""
        with self._app.connection(self._broker.url()) as connection:
            (tag,) = [tag for tag, queue in self._unacknowledged() if queue == self._queue]
            connection.default_channel.qos.restore_by_tag(tag)

    def drop_connections(self):
        """The broker is this run's own."""
        with self._broker.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)

    def messages(self):
        """How many of its messages the broker has, delivered ones that nobody acknowledged too."""
        with self._broker.client() as client:
            waiting = client.llen(self._queue)
        return waiting + sum(queue == self._queue for _, queue in self._unacknowledged())

    def settle(self, outcome):
        """Wait until all has come to what it should; the runs."""
        wait_until(
            lambda: len(self.runs()) >= outcome.runs and all(run.is_over for run in self.runs()),
            f"{outcome.runs} runs are over",
        )
        wait_until(self._watch.is_free, "the lock is free")
        self._come_to("messages at the broker", self.messages, {outcome.message.left})
        if outcome.states == {"PENDING"} and not self._is_workers_end:
            self._wait_until_idle()
        self._come_to("state", self._state, outcome.states)
        return self.runs()

    @staticmethod
    def _come_to(what, look, expected):
        seen = []
        with suppress(AssertionError):  # to say what is there instead
            wait_until(lambda: seen.append(look()) or seen[-1] in expected, what)
        assert seen[-1] in expected, f"{what}: {seen[-1]} where it should be {expected}"

    def _state(self):
        """As it is stored now; a result object remembers the first final one."""
        return self._app.backend.get_state(self._task_id)

    @property
    def _queue(self):
        return self.worker.worker_queue

    def _unacknowledged(self):
        with self._broker.client() as client:
            return [
                (tag, json.loads(message)[2]) for tag, message in client.hgetall("unacked").items()
            ]

    def _wait_until_idle(self):
        host = self.worker.hostname()
        inspect = self._app.control.inspect([host], limit=1, timeout=10)
        wait_until(lambda: not (inspect.active() or {}).get(host), "the worker has done with it")


def cases():
    for ending in ENDINGS:
        mark = pytest.mark.skipif(
            not ending.is_known_to_this_celery, reason=f"Celery has this since {ending.since}"
        )
        for pool in POOLS:
            if isinstance(ending.outcome(pool), Outcome):
                name = f"{ending.name.replace('`', '')}-{pool}"
                yield pytest.param(ending, pool, id=name, marks=mark)


@pytest.fixture
def broker(ending, redis_server):
    """The shared one, or one for this run alone, whose connections may be dropped."""
    if not ending.settings.get("own_broker"):
        yield redis_server
        return
    with RedisServer() as server:
        yield server


@pytest.fixture
def worker_of_ending(ending, pool, broker, shared_worker, start_worker):
    """A shared worker, or one that may be harmed."""
    settings = dict(ending.settings)
    if not settings and not ending.own_worker:
        return shared_worker(pool)
    if settings.pop("own_broker", False):
        settings["broker_url"] = broker.url()
    slots = 1 if pool == "solo" else 2
    return start_worker(pool=pool, **{"concurrency": slots, **settings})


@pytest.fixture
def watch(lock_server, label):
    key = ending_tasks.end._lock_options.key(PREFIX, (label, ""), {})
    with LockWatch(lock_server.client(), key) as watch:
        yield watch


@pytest.fixture
def stage(app, ending, pool, worker_of_ending, broker, label, history, watch):
    return Stage(app, ending, pool, worker_of_ending, broker, label, history, watch)


@pytest.mark.parametrize(("ending", "pool"), list(cases()))
def test_the_lock_leaves_with_its_run(ending, pool, stage, watch):
    outcome = ending.outcome(pool)

    ending.play(stage)
    runs = stage.settle(outcome)

    assert len(runs) == outcome.runs
    assert overlaps(runs) == 0
    for run in runs:
        owners = watch.owners_within(run.start, run.end)
        assert None not in owners
        assert len(owners) <= 1, "the lock was one run's for as long as its body lived"
    if outcome.free is NEVER_TAKEN:
        assert {sample.owner_token for sample in watch.samples} == {None}
    elif runs:
        over = max(watch.over(run) for run in runs)
        assert watch.free_since() - over < outcome.free.within
        if outcome.free is BY_TTL and len(runs) == 1:
            assert watch.free_since() - over > 0.1, "nobody could have seen it"
