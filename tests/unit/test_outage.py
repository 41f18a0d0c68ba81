"""How long a run has waited for its lock, when the store was away for some of that time."""

from __future__ import annotations

import time
from uuid import uuid4

import pytest
from celery import Celery, states
from celery.app.trace import build_tracer
from kombu.exceptions import OperationalError

from celery_singleton_lock import SingletonTask, outage
from celery_singleton_lock.errors import StoreError
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.stores.base import Claimant

OTHER = Claimant("other", "celery@there", 12)


@pytest.fixture
def clock(clock, monkeypatch):
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
def app():
    app = Celery("tests", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.singleton_store_url = "memory://"
    app.conf.task_default_queue = uuid4().hex  # a broker in memory is the whole process's
    yield app
    app.close()


@pytest.fixture
def book(app):
    @app.task(base=SingletonTask, on_conflict="requeue", wait_timeout=10, shared=False)
    def book():
        return "booked"

    return book


@pytest.fixture
def store(app, book):
    """The store of the app, where another run has the lock of ``book``."""
    locks = AppLocks.of(app)
    key = book._lock_options.key(locks.address.key_prefix, (), {})
    locks.store.acquire(key, "other", 60.0, OTHER)
    return locks.store


@pytest.fixture
def deliver(app, book):
    """Runs ``book`` as a worker does: how it ended, and the headers with which it went back."""

    def deliver(headers):
        request = {"id": "mine", "headers": headers, "delivery_info": {}, "is_eager": False}
        state = build_tracer(book.name, book, app=app)("mine", (), {}, request).info.state
        name = app.conf.task_default_queue
        with app.connection() as connection, connection.SimpleQueue(name) as queue:
            message = queue.get_nowait() if queue.qsize() else None
            if message:
                message.ack()
        return state, message and message.headers

    return deliver


class Outage:
    """A store that does not answer, until so many questions were asked.

    Args:
        store: It answers then.
        clock: Moves on by 100 seconds at each question.
        questions: How many.
    """

    def __init__(self, store, clock, questions):
        self._acquire, self._clock, self._left = store.acquire, clock, questions

    def acquire(self, *args):
        if not self._left:
            return self._acquire(*args)
        self._left -= 1
        self._clock.advance(100)
        raise StoreError("away")


@pytest.mark.parametrize("is_broker_away", [False, True])
def test_the_time_of_an_outage_does_not_count_towards_the_wait_timeout(
    deliver, store, clock, monkeypatch, is_broker_away
):
    # Given a run that has waited 4 seconds when the store, or the broker too, goes away
    _, headers = deliver({})
    clock.advance(4)
    monkeypatch.setattr(store, "acquire", Outage(store, clock, 3).acquire)
    if is_broker_away:
        monkeypatch.setattr(outage, "requeue_delay", lambda requeues: 0.0)
        put_back, failures = outage.put_back, iter([OperationalError] * 3)

        def fail_three_times(*args):
            for error in failures:
                raise error
            put_back(*args)

        monkeypatch.setattr(outage, "put_back", fail_three_times)

    for _ in range(1 if is_broker_away else 4):
        state, headers = deliver(headers)
        assert state == states.IGNORED

    clock.advance(5)
    state, headers = deliver(headers)
    assert state == states.IGNORED
    clock.advance(2)
    assert deliver(headers) == (states.FAILURE, None)
