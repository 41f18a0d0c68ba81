"""Locks that are taken by hand are those of the tasks."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from celery import Celery

from celery_singleton_lock import (
    ConfigurationError,
    DuplicateTaskError,
    KeyDerivationError,
    LockHeldError,
    SingletonTask,
    StoreError,
    lock,
    locks,
)
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.stores.base import Claimant
from waiting import wait_until

THEM = Claimant("theirs", "celery@there", 7)


@pytest.fixture
def app():
    app = Celery("by-hand", set_as_current=False, broker="memory://")
    app.conf.task_always_eager = True
    return app


@pytest.fixture
def task(app):
    @app.task(
        base=SingletonTask,
        bind=True,
        lock_name="inventory",
        lock_args="sku",
        on_conflict="skip",
        shared=False,
    )
    def sell(self, sku, body=None):
        return body(self) if body else sku

    return sell


@pytest.fixture
def anvils(app):
    return lock(app, "inventory", "anvil")


def held_by_another(app, key):
    AppLocks.of(app).store.acquire(key, "theirs", 60.0, THEM)


def elsewhere(call, *args):
    """What another thread gets that calls it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *args).result()


def test_a_lock_by_name_is_that_of_the_task_with_this_name_and_these_arguments(app, task, anvils):
    assert anvils.key == task.lock("anvil").key == task.lock(sku="anvil", body=None).key
    assert anvils.key != lock(app, "inventory", "hammer").key
    assert anvils.key != lock(app, "inventory").key


def test_a_lock_is_held_within_its_with_block_and_excludes_runs_of_the_task(task, anvils):
    with anvils as lease:
        assert lease.fencing_token > 0
        assert not lease.is_lost
        lease.check()
        refused = elsewhere(task.delay, "anvil")
        assert isinstance(refused.result, DuplicateTaskError)
        assert anvils.holder().fencing_token == lease.fencing_token
        assert refused.result.holder == anvils.holder() == task.holder("anvil")

    assert anvils.holder() is None
    assert elsewhere(task.delay, "anvil").get() == "anvil"


def test_a_lock_is_given_back_by_whatever_ends_the_block(anvils):
    with pytest.raises(KeyboardInterrupt), anvils:
        raise KeyboardInterrupt

    assert anvils.holder() is None


def test_a_held_lock_is_not_waited_for_unless_asked(app, anvils):
    held_by_another(app, anvils.key)

    assert anvils.acquire() is None
    assert anvils.holder().task_id == "theirs"


def test_who_waits_has_the_lock_as_soon_as_it_is_free(app, anvils):
    held_by_another(app, anvils.key)
    release = threading.Timer(0.2, AppLocks.of(app).store.release, [anvils.key, "theirs"])
    release.start()

    lease = anvils.acquire(wait_timeout=timedelta(seconds=20))

    assert lease.release()
    assert not lease.release()
    assert anvils.holder() is None


def test_who_waits_in_vain_learns_of_the_holder_and_leaves_the_line(app, anvils):
    app.conf.singleton_wait_timeout = 0.1
    anvils = lock(app, "inventory", "anvil")
    held_by_another(app, anvils.key)

    with pytest.raises(LockHeldError, match=r"held for 0\.1 s") as caught, anvils:
        pytest.fail("somebody else has it")

    assert caught.value.holder.task_id == "theirs"
    AppLocks.of(app).store.release(anvils.key, "theirs")
    assert anvils.holder() is None


def test_who_is_interrupted_while_it_waits_leaves_the_line(app, anvils, monkeypatch):
    held_by_another(app, anvils.key)
    store = AppLocks.of(app).store

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "await_turn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        anvils.acquire(wait_timeout=20)

    store.release(anvils.key, "theirs")
    assert anvils.holder() is None


def test_a_lock_is_reentrant_within_a_thread_and_only_there(anvils):
    with anvils as outer:
        with anvils as inner:
            assert inner.fencing_token == outer.fencing_token
        assert anvils.holder() is not None
        assert elsewhere(anvils.acquire) is None


def test_a_block_may_be_left_in_another_thread_than_it_was_entered_in(anvils):
    anvils.__enter__()

    elsewhere(anvils.__exit__, None, None, None)

    assert anvils.holder() is None
    assert elsewhere(anvils.acquire)


def test_a_block_that_has_lost_its_lock_does_not_give_back_that_of_another_thread(app, anvils):
    with anvils:
        AppLocks.of(app).store.lose_data()
        theirs = elsewhere(anvils.__enter__)

    assert anvils.holder().fencing_token == theirs.fencing_token
    elsewhere(anvils.__exit__, None, None, None)
    assert anvils.holder() is None


def test_a_coroutine_that_was_started_within_a_block_does_not_hold_its_lock(anvils):
    async def take():
        lease = anvils.acquire()
        return lease and lease.release()

    async def both():
        with anvils as outer:
            with anvils as inner:
                assert inner.fencing_token == outer.fencing_token
            return await asyncio.create_task(take())

    assert asyncio.run(both()) is None


def test_a_block_whose_end_is_interrupted_gives_the_lock_back(app, anvils, monkeypatch):
    store = AppLocks.of(app).store
    release = store.release

    def interrupt(*args):
        monkeypatch.setattr(store, "release", release)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "release", interrupt)
    with pytest.raises(KeyboardInterrupt), anvils:
        pass

    assert anvils.holder() is None


def test_leases_that_are_let_go_elsewhere_are_not_remembered(app):
    for sku in range(20):
        elsewhere(lock(app, "inventory", sku).acquire().release)

    assert len(locks._held_here.get()) <= 1


def test_within_its_body_a_runs_lock_can_be_taken_again(task):
    def body(self):
        with self.lock("anvil") as lease:
            return lease.fencing_token == self.lease.fencing_token

    assert task.apply(("anvil", body)).get()
    assert task.holder("anvil") is None


def test_within_a_lock_by_hand_a_run_of_its_task_can_be_called(task):
    with task.lock("anvil"):
        assert task.delay("anvil").get() == "anvil"
        assert task.holder("anvil") is not None


def test_a_lease_that_nobody_has_any_more_is_given_back(app, caplog):
    app.conf.singleton_lock_ttl = 0.3
    forgotten = lock(app, "inventory", "anvil")
    forgotten.acquire()
    gc.collect()

    wait_until(lambda: "ended without giving it back" in caplog.text, "it was noticed")
    wait_until(lambda: forgotten.holder() is None, "it is given back")


def test_a_lease_by_hand_is_renewed(app):
    app.conf.singleton_lock_ttl = 0.3
    store = AppLocks.of(app).store
    renewed = threading.Event()
    renew_many, store.renew_many = (
        store.renew_many,
        lambda claims: renewed.set() or renew_many(claims),
    )

    with lock(app, "inventory", "anvil") as lease:
        assert renewed.wait(20)
        lease.check()


def test_a_lost_lease_by_hand_is_warned_of_and_its_check_raises(app, caplog):
    app.conf.singleton_lock_ttl = 0.3
    anvils = lock(app, "inventory", "anvil")
    with anvils as lease:
        AppLocks.of(app).store.lose_data()
        held_by_another(app, anvils.key)

        wait_until(lambda: "was lost before it was released" in caplog.text, "it is warned of")
        assert lease.is_lost

    assert anvils.holder().task_id == "theirs"


def test_a_store_that_is_away_is_an_error_at_the_beginning_and_a_warning_at_the_end(
    app, anvils, store, caplog
):
    AppLocks.of(app).store = store
    store.is_away = True
    with pytest.raises(StoreError), anvils:
        pytest.fail("nobody knows whether it is free")

    store.is_away = False
    with anvils:
        store.is_away = True

    assert "ends with its ttl" in caplog.text


def test_what_makes_no_sense_is_said_at_once(app, task):
    with pytest.raises(KeyDerivationError, match="No lock key for inventory"):
        lock(app, "inventory", object())
    with pytest.raises(ConfigurationError, match="not empty"):
        lock(app, "")
    with pytest.raises(TypeError):
        task.lock("anvil", None, "too", "many")
    app.conf.singleton_lock_tll = 3
    with pytest.raises(ConfigurationError, match="Did you mean singleton_lock_ttl"):
        lock(app, "inventory")


def test_celerys_own_tasks_have_no_lock():
    app = Celery("by-hand", set_as_current=False, task_cls=SingletonTask, broker="memory://")

    with pytest.raises(ConfigurationError, match="without a lock"):
        app.tasks["celery.chord_unlock"].lock()


def test_locks_that_are_switched_off_are_free_for_all(app, task, anvils):
    held_by_another(app, anvils.key)
    app.conf.singleton_enabled = False

    with anvils as lease:
        lease.check()
        assert lease.fencing_token == 0
    assert anvils.acquire().release() is False
    assert task.lock("anvil").acquire()
    assert task.holder("anvil") is None
