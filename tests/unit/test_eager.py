"""Eager runs lock like a worker's, in this process's memory where no Redis is configured."""

from __future__ import annotations

import signal
import threading

import pytest
from celery import Celery, states
from kombu.exceptions import EncodeError

from celery_singleton_lock import (
    DuplicateTaskError,
    LeaseLostError,
    LockHeldError,
    SingletonTask,
    StoreError,
    lease_lost,
    lock_acquired,
    lock_refused,
    lock_released,
)
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.stores.base import Claimant

THEM = Claimant("theirs", "celery@there", 7)


@pytest.fixture
def app():
    app = Celery("eager", set_as_current=False, broker="memory://")
    app.conf.task_always_eager = True
    return app


def test_a_run_that_can_be_aborted_leaves_no_signal_handler_behind(app):
    def handler(number, frame):
        pass

    @app.task(base=SingletonTask, on_lease_lost="abort", shared=False)
    def task():
        return signal.getsignal(signal.SIGUSR1) is handler

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        assert task.delay().get() is False
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def locks(app):
    return AppLocks.of(app)


@pytest.fixture
def events():
    """What the signals told, in order: name and event."""
    told = []
    signals = (lock_acquired, lock_refused, lock_released, lease_lost)
    receivers = [
        lambda sender, event, name=each.name, **_: told.append((name, event)) for each in signals
    ]
    for each, receiver in zip(signals, receivers, strict=True):
        each.connect(receiver)
    yield told
    for each, receiver in zip(signals, receivers, strict=True):
        each.disconnect(receiver)


def a_task(app, body, **options):
    options = {"base": SingletonTask, "name": "shop.buy", "shared": False, **options}
    return app.task(bind=True, **options)(body)


def sell(self, sku):
    return sku


def own_token(self, sku):
    return self.lease.fencing_token


def held_by_another(task, locks, *args):
    """Somebody else takes the lock of this call."""
    key = task._lock_options.key("singleton:", args, {})
    assert locks.store.acquire(key, "theirs", 60.0, THEM).is_acquired
    return key


def test_a_run_has_a_lease_and_gives_it_back(app, locks, events):
    def body(self, sku):
        holder = locks.store.holder(self.lease.key)
        return holder.task_id == self.request.id and holder.fencing_token > 0

    task = a_task(app, body)

    assert task.delay("anvil").get()
    assert locks.store.holder(task._lock_options.key("singleton:", ("anvil",), {})) is None
    assert [name for name, _ in events] == ["lock_acquired", "lock_released"]
    assert events[0][1] == events[1][1]
    assert events[0][1].task_name == "shop.buy"


def test_an_eager_run_that_raises_to_its_caller_frees_its_lock(app, locks, events):
    def body(self, sku):
        raise KeyError(sku)

    task = a_task(app, body)

    with pytest.raises(KeyError):
        task.apply(("anvil",), throw=True)

    assert locks.store.holder(task._lock_options.key("singleton:", ("anvil",), {})) is None
    assert [name for name, _ in events] == ["lock_acquired", "lock_released"]


def test_a_nested_call_of_the_same_lock_does_not_meet_itself(app, locks):
    def body(self, sku, depth):
        inner = self.apply((sku, depth - 1)).result if depth else []
        assert locks.store.holder(key), "the nested call must not have given it back"
        return [self.lease.fencing_token, *inner]

    task = a_task(app, body, lock_args="sku", on_conflict="fail")
    key = task._lock_options.key("singleton:", ("anvil", 2), {})

    tokens = task.delay("anvil", 2).get()

    assert len(tokens) == 3
    assert len(set(tokens)) == 1


def test_after_an_early_release_a_nested_call_takes_the_lock_anew(app):
    def body(self, sku, depth):
        token = self.lease.fencing_token
        if depth == 0:
            return [token]
        self.lease.release()
        return [token, *self.apply((sku, 0)).result]

    task = a_task(app, body, lock_args="sku", on_conflict="fail")

    first, second = task.delay("anvil", 1).get()

    assert second > first


def test_a_skipped_run_is_revoked_and_raises_to_its_caller(app, locks, events):
    def body(self, sku):
        raise AssertionError("must not run")

    task = a_task(app, body)
    key = held_by_another(task, locks, "anvil")

    result = task.delay("anvil")
    with pytest.raises(DuplicateTaskError) as caught:
        result.get()

    assert result.state == states.REVOKED
    assert caught.value.holder.task_id == "theirs"
    assert locks.store.holder(key).task_id == "theirs"
    ((name, event),) = events
    assert (name, event.outcome, event.holder.task_id) == ("lock_refused", "skip", "theirs")


def test_a_skipped_run_raises_at_once_where_errors_propagate(app, locks):
    task = a_task(app, sell)
    held_by_another(task, locks, "anvil")

    with pytest.raises(DuplicateTaskError):
        task.apply(("anvil",), throw=True)
    app.conf.task_eager_propagates = True
    with pytest.raises(DuplicateTaskError):
        task.delay("anvil")


@pytest.mark.parametrize("policy", ["requeue", "wait"])
def test_a_run_without_a_queue_waits_where_it_is(app, locks, policy):
    task = a_task(app, sell, on_conflict=policy)
    key = held_by_another(task, locks, "anvil")
    threading.Timer(0.2, locks.store.release, [key, "theirs"]).start()

    result = task.delay("anvil")

    assert result.get() == "anvil"
    assert locks.store.holder(key) is None


@pytest.mark.parametrize("policy", ["requeue", "wait"])
def test_a_run_that_has_waited_too_long_fails_and_leaves_the_line(app, locks, policy):
    task = a_task(app, sell, on_conflict=policy, wait_timeout=0.1)
    key = held_by_another(task, locks, "anvil")

    result = task.delay("anvil")
    locks.store.release(key, "theirs")

    assert result.state == states.FAILURE
    with pytest.raises(LockHeldError, match="wait_timeout is over"):
        result.get()
    assert locks.store.holder(key) is None


def test_a_lock_that_is_given_back_early_is_free_for_the_rest_of_the_body(app, locks, events):
    @app.task(base=SingletonTask, bind=True, name="shop.buy", shared=False)
    def task(self, depth):
        assert self.lease.release()
        assert not self.lease.release()
        with pytest.raises(LeaseLostError, match="was given back"):
            self.lease.check()
        assert locks.store.holder(self._lock_options.key("singleton:", (depth,), {})) is None
        return depth

    assert task.delay(1).get() == 1
    assert [name for name, _ in events] == ["lock_acquired", "lock_released"]


def test_an_eager_run_whose_store_is_away_fails(app, locks, store):
    def body(self, sku):
        raise AssertionError("must not run")

    locks.store = store
    store.is_away = True

    with pytest.raises(StoreError):
        a_task(app, body).delay("anvil").get()


def test_a_retry_that_runs_inline_gets_the_lock_again(app):
    def body(self, sku):
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return self.request.retries

    assert a_task(app, body).delay("anvil").get() == 2


def test_a_direct_call_takes_no_lock(app, locks):
    def body(self, sku):
        self.lease.check()
        return self.lease.fencing_token

    task = a_task(app, body)
    held_by_another(task, locks, "anvil")

    assert task("anvil") == 0


def test_a_lease_that_was_lost_is_told_once_at_the_end(app, locks, events):
    def body(self, sku):
        locks.store.release(self.lease.key, self.lease.claim.owner_token)  # an operator, say

    a_task(app, body).delay("anvil").get()

    assert [name for name, _ in events] == ["lock_acquired", "lease_lost"]


def test_tasks_of_an_app_whose_locks_are_switched_off_ask_no_store(app, locks, store, events):
    locks.store = store
    store.is_away = True
    task = a_task(app, own_token)
    app.conf.singleton_enabled = False

    assert task.delay("anvil").get() == 0
    assert (store.asked, events) == (0, [])
    with pytest.raises(EncodeError):  # Celery's own: whether there is a key is not asked
        task.delay(object())


def test_locks_can_be_switched_on_again(app, locks):
    task = a_task(app, own_token)
    app.conf.singleton_enabled = False
    task.delay("anvil").get()

    app.conf.singleton_enabled = True

    assert task.delay("anvil").get() > 0
