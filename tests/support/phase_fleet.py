"""A fleet for tests of the publish-time phases, whose time passes when it is told to.

Messages, requests, runs and Redis keys are real. A run is a thread in which Celery's own request
executes; its body does what it is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from queue import SimpleQueue
from typing import Any, NamedTuple

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, states
from celery.exceptions import Ignore
from celery.signals import task_unknown
from celery.worker import state as worker_state
from kombu import Queue

from celery_singleton_lock import SingletonTask, contention, phases
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.publishing import HEADER as WAITING
from celery_singleton_lock.request import SingletonRequest
from celery_singleton_lock.stores import redis as redis_store
from redis_server import RedisServer

#: Seconds; all times are multiples of it, and what passes while a test runs is far below.
TICK = 20.0
#: In ticks.
LOCK_TTL = 3
RESERVATION_TTL = 6
REQUEUE_DELAY = 1
#: Seconds; a thread that does not answer for so long has a fault.
LONGEST_ANSWER = 20.0

#: Makes a tick pass for the keys that match ARGV[1].
#:
#: ARGV[2] is a tick in ms, ARGV[3] and ARGV[4] are the keys of lock and reservation: what they
#: have left is brought back to whole ticks, so that real time does not add up. The sets of a line
#: are forgotten with the last of its places, as in real time, where they live for longer.
PASS_TICK = """
local tick = tonumber(ARGV[2])
local sets, is_anybody_in_line = {}, false
for _, key in ipairs(redis.call("KEYS", ARGV[1])) do
  local kind, left = redis.call("TYPE", key).ok, redis.call("PTTL", key) - tick
  if key == ARGV[3] or key == ARGV[4] then
    left = math.floor(left / tick + 0.5) * tick
  end
  if kind == "zset" then
    table.insert(sets, key)
  elseif left < tick / 10 then
    redis.call("DEL", key)
  else
    if kind == "string" and redis.call("GETRANGE", key, 0, 0) == "{" then
      local place = cjson.decode(redis.call("GET", key))
      place.due_ms = place.due_ms - tick
      redis.call("SET", key, cjson.encode(place))
      is_anybody_in_line = true
    end
    redis.call("PEXPIRE", key, string.format("%.0f", left))
  end
end
for _, key in ipairs(sets) do
  redis.call("PEXPIRE", key, is_anybody_in_line and 10000 or 0)
end
"""


def in_ticks(monkeypatch: Any) -> None:
    """Have what is not to be configured last whole ticks, or no time at all."""
    monkeypatch.setattr(contention, "requeue_delay", lambda requeues: REQUEUE_DELAY * TICK)
    monkeypatch.setattr(redis_store, "DUE_FOR", TICK)
    monkeypatch.setattr(phases, "LEAVING_FOR", 0.0)
    monkeypatch.setattr(contention, "LONGEST_STAY", 0.0)


@dataclass
class Delivery:
    """One copy of a message.

    Attributes:
        message: As it was published.
        due_at: The tick at which a worker starts it.
        expires_at: The tick at which a worker throws it away; ``None``: never.
        is_redelivered: Whether the broker says so.
    """

    message: Any
    due_at: int
    expires_at: int | None
    is_redelivered: bool = False

    @property
    def task_id(self) -> str:
        """Of its run."""
        return self.message.headers["id"]

    @property
    def is_reserved(self) -> bool:
        """Whether it says that something was reserved for it."""
        return phases.RESERVED in self.message.headers

    @property
    def is_known_as_redelivered(self) -> bool:
        """Whether that is so, or was before it was put back."""
        waiting = self.message.headers.get(WAITING)
        return self.is_redelivered or bool(waiting and waiting[2])

    @property
    def is_promised(self) -> bool:
        """Whether its run was let in before, so that its policy may not end it (R5)."""
        headers = self.message.headers
        return self.is_redelivered or bool(headers["retries"]) or WAITING in headers


class Run(threading.Thread):
    """One delivery in a worker: its body goes on when it is told what to do."""

    def __init__(self, delivery: Delivery, request: Any) -> None:
        super().__init__(daemon=True)
        self.delivery = delivery
        self.task_id = delivery.task_id
        self.request = request
        self.owner_token = request._owner_token
        self.is_renewed = True
        self._orders: SimpleQueue[Callable[[Any], bool]] = SimpleQueue()
        self._reports: SimpleQueue[bool] = SimpleQueue()

    def begins(self) -> bool:
        """Execute, up to the beginning of the body: whether it comes to that."""
        self.start()
        return self._is_in_body()

    def does(self, order: Callable[[Any], bool]) -> bool:
        """Have the body do something with its task; it ends if that raises or is true.

        Returns:
            Whether the body goes on.
        """
        self._orders.put(order)
        return self._is_in_body()

    def run(self) -> None:
        """What its thread does."""
        try:
            self.request.execute()
        finally:
            self._reports.put(False)

    def body(self, task: Any) -> None:
        """What the task does."""
        while True:
            self._reports.put(True)
            if self._orders.get()(task):
                return

    def _is_in_body(self) -> bool:
        if self._reports.get(timeout=LONGEST_ANSWER):
            return True
        self.join(LONGEST_ANSWER)
        return False


def _body(self: Any, number: int) -> None:
    threading.current_thread().body(self)


class Fleet:
    """An app with one task, its queue and its workers.

    Args:
        server: Where its locks are.
        phase: Of its task.
    """

    def __init__(self, server: RedisServer, phase: str) -> None:
        self.client = server.client()
        self.app = Celery(
            "fleet", set_as_current=False, broker="memory://", backend="cache+memory://"
        )
        self.app.conf.update(
            singleton_store_url=server.url(), task_default_queue=f"fleet-{id(self)}"
        )
        self.task = self.app.task(
            bind=True,
            base=SingletonTask,
            name="fleet.run",
            shared=False,
            acks_late=True,
            reject_on_worker_lost=True,
            max_retries=None,
            lock_phase=phase,
            lock_ttl=LOCK_TTL * TICK,
            lock_reservation_ttl=RESERVATION_TTL * TICK,
        )(_body)
        self.locks = AppLocks.of(self.app)
        # Time is not real here: leases are renewed with each tick.
        self.locks._renewer.keep = lambda *args: None
        self._connection = self.app.connection_for_read()
        self._queue = Queue(self.app.conf.task_default_queue, channel=self._connection)
        self._queue.declare()
        self._pass_tick = self.client.register_script(PASS_TICK)
        self.number = 0
        self.now = 0
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget all, and go on with a call that was never made."""
        self.client.flushdb()
        self._queue.purge()
        worker_state.revoked.clear()
        self.number += 1
        self.now = 0
        options = self.task._lock_options
        self.lock_key = options.key(self.locks.address.key_prefix, (self.number,), {})
        self.reserved_key = phases.reserved_key(options, self.lock_key)

    def close(self) -> None:
        """Give connections back."""
        self._connection.release()
        self.locks.store.close()
        self.client.close()

    def publish(self, **options: Any) -> Any:
        """Make the call."""
        return self.task.apply_async((self.number,), **options)

    def published(self) -> list[Delivery]:
        """What has come to the queue since."""
        return [self._delivery(message) for message in iter(self._queue.get, None)]

    def is_finished(self, task_id: str) -> bool:
        """Whether its outcome is stored."""
        return phases.is_finished(self.task, task_id)

    def has_succeeded(self, task_id: str) -> bool:
        """Whether SUCCESS is."""
        return self.task.backend.get_state(task_id) == states.SUCCESS

    def pass_tick(self, runs: list[Run]) -> None:
        """Let a tick pass, in which these renew their leases."""
        self.now += 1
        _, _, name = self.lock_key.partition("}:")
        pattern = f"*{name}*"
        self._pass_tick(args=[pattern, round(TICK * 1000), self.lock_key, self.reserved_key])
        for run in runs:
            self.locks.store.renew(self.lock_key, run.owner_token, LOCK_TTL * TICK)

    def request(self, delivery: Delivery) -> Any:
        """What a worker makes of it."""
        headers, message = dict(delivery.message.headers), delivery.message
        if delivery.expires_at is not None:
            # A second less than a tick, for it has to be over when it is.
            left = timedelta(seconds=(delivery.expires_at - self.now) * TICK - 1)
            headers["expires"] = (datetime.now(timezone.utc) + left).isoformat()
        message.delivery_info["redelivered"] = delivery.is_redelivered
        return SingletonRequest(message, headers=headers, app=self.app, task=self.task)

    def tell_of_death(self, request: Any, *, is_lost: bool) -> bool:
        """The main process sees that the child is gone: by itself, or because it was told to.

        Returns:
            Whether it has given the message back to the broker.
        """
        given_back: list[bool] = []
        request._on_reject = lambda logger, errors, requeue: given_back.append(requeue)
        request.acknowledged = False  # where a child executes it, that is done after this
        try:
            raise WorkerLostError("killed") if is_lost else Terminated("SIGTERM")
        except (WorkerLostError, Terminated):
            request.on_failure(ExceptionInfo())
        return any(given_back)

    def throw_away(self, delivery: Delivery) -> None:
        """A worker of another release does not know the task."""
        told = {"exc": KeyError(self.task.name), "name": self.task.name, "id": delivery.task_id}
        task_unknown.send(_Consumer(self.app), message=delivery.message, **told)

    def is_anybody_in_line(self) -> bool:
        """Whether the lock's line has places."""
        line = redis_store._line(self.lock_key)
        return any(key.rpartition(":")[2].isdigit() for key in self.client.keys(f"{line}:*"))

    def _delivery(self, message: Any) -> Delivery:
        headers = message.headers
        expires_in = _ticks_until(headers["expires"])
        return Delivery(
            message,
            self.now + (_ticks_until(headers["eta"]) or 0),
            None if expires_in is None else self.now + expires_in,
        )


class _Consumer(NamedTuple):
    app: Celery


def dies(task: Any) -> bool:
    """A body's end of which nothing unwinds: whatever held the lock is gone."""
    del task.request.singleton_lease
    raise Ignore("gone")


def dies_once_it_is_stored(task: Any) -> bool:
    """As :func:`dies`, when Celery has stored its result and not yet called the hooks after it."""
    del task.request.singleton_lease
    return True


def _ticks_until(moment: str | None) -> int | None:
    if moment is None:
        return None
    left = datetime.fromisoformat(moment) - datetime.now(timezone.utc)
    return round(left.total_seconds() / TICK)
