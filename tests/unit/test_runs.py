"""How a run takes its lock and gives it back, when something comes in between."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from uuid import uuid4

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, SoftTimeLimitExceeded

from celery_singleton_lock import SingletonTask, lease_lost, runs
from celery_singleton_lock.aborting import Abort
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.publishing import HEADER, Waiting
from celery_singleton_lock.stores.base import Claimant
from waiting import wait_until


@pytest.fixture
def app():
    app = Celery("shop", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.singleton_store_url = "memory://"
    return app


@pytest.fixture
def store(app):
    return AppLocks.of(app).store


@pytest.fixture
def losses():
    told = []

    def tell(event, **_):
        told.append(event)

    lease_lost.connect(tell)
    yield told
    lease_lost.disconnect(tell)


@pytest.fixture
def soft_time_limit():
    """The handler of a child process, in this one."""

    def handler(number, frame):
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    signal.signal(signal.SIGUSR1, before)


def new_task(app, body, **options):
    return app.task(bind=True, base=SingletonTask, name="shop.buy", shared=False, **options)(body)


def deliver(task, **request):
    """Run ``task`` as a worker does that gets a message for it."""
    request = {"id": str(uuid4()), "args": (), "kwargs": {}, "delivery_info": {}, **request}
    return build_tracer(task.name, task, app=task.app)(request["id"], (), {}, request)


def key_of(task):
    return task._lock_options.key("singleton:", (), {})


def take_away(store, task):
    """The lock of the current run is somebody else's now."""
    store.release(key_of(task), task.lease.claim.owner_token)
    store.acquire(key_of(task), "theirs", 60.0, Claimant("theirs", "there", 7))


@pytest.mark.parametrize(("owner", "name"), [(AppLocks, "of"), (AppLocks, "let_go")])
@pytest.mark.parametrize("on_lease_lost", ["warn", "abort"])
def test_a_time_limit_that_comes_while_the_lock_is_given_back_leaks_none(
    app, store, monkeypatch, soft_time_limit, owner, name, on_lease_lost
):
    def body(self):
        original = getattr(owner, name)

        def late(*args):
            monkeypatch.undo()
            signal.raise_signal(signal.SIGUSR1)
            return original(*args)

        monkeypatch.setattr(owner, name, late)
        raise Ignore  # after it, Celery calls one hook only

    task = new_task(app, body, on_lease_lost=on_lease_lost)
    deliver(task)

    assert store.holder(key_of(task)) is None
    assert signal.getsignal(signal.SIGUSR1) is soft_time_limit


def test_so_does_one_that_comes_while_an_abort_is_called_off(
    app, store, monkeypatch, soft_time_limit
):
    def body(self):
        original = Abort.disarm

        def late(abort):
            monkeypatch.undo()
            signal.raise_signal(signal.SIGUSR1)
            original(abort)

        monkeypatch.setattr(Abort, "disarm", late)
        raise Ignore

    task = new_task(app, body, on_lease_lost="abort")
    deliver(task)

    assert store.holder(key_of(task)) is None
    assert signal.getsignal(signal.SIGUSR1) is soft_time_limit


def test_a_lock_whose_run_ended_without_a_word_is_given_back(app, store, monkeypatch):
    # Given a signal that ends Celery's own telling
    monkeypatch.setattr(runs, "end", lambda task: None)
    tokens = []

    def body(self):
        tokens.append(self.lease.fencing_token)

    task = new_task(app, body, lock_ttl=0.3)
    deliver(task)
    # A run that comes at once does not take that lease for an enclosing one
    deliver(task)

    assert len(set(tokens)) == 2
    wait_until(lambda: store.holder(key_of(task)) is None, "the lock is free", timeout=5)


def test_a_loss_that_the_renewal_never_saw_is_told_at_the_end(app, store, losses, monkeypatch):
    # Given a body that lets nothing else run for longer than its ttl
    monkeypatch.setattr(AppLocks.of(app)._renewer, "keep", lambda *args: None)

    def body(self):
        take_away(store, self)
        wait_until(lambda: self.lease.is_lost, "its own clock knows")

    task = new_task(app, body, lock_ttl=0.1)
    deliver(task, id="one")

    assert [event.task_id for event in losses] == ["one"]


def test_a_body_that_has_returned_is_not_aborted(app, store, losses, monkeypatch, soft_time_limit):
    # Given a body whose lease is lost while its result is stored
    def body(self):
        take_away(store, self)

    task = new_task(app, body, lock_ttl=0.3, on_lease_lost="abort")
    backend = type(task.backend)
    store_result = backend.store_result

    def store_slowly(self, *args, **kwargs):
        stored = store_result(self, *args, **kwargs)
        wait_until(lambda: losses, "the loss was seen")
        return stored

    monkeypatch.setattr(backend, "store_result", store_slowly)
    deliver(task, id="two")

    assert len(losses) == 1, "told once, by the renewal"
    assert task.AsyncResult("two").state == "SUCCESS"


def test_a_lock_that_was_lost_before_its_body_began_is_no_loss_to_tell(
    app, store, losses, monkeypatch, caplog
):
    # Given a time limit that comes when the lock is taken and not yet looked after
    def interrupted(task, *args):
        take_away(store, task)
        raise SoftTimeLimitExceeded

    def body(self):
        raise AssertionError("must not run")

    monkeypatch.setattr(runs, "_hold", interrupted)
    task = new_task(app, body)
    deliver(task, id="four")

    assert isinstance(task.AsyncResult("four").result, SoftTimeLimitExceeded)
    assert losses == []
    assert "AttributeError" not in caplog.text
    assert store.holder(key_of(task)).task_id == "theirs"


def test_a_copy_that_need_not_run_keeps_no_lock(app, store):
    def body(self):
        raise AssertionError("must not run")

    task = new_task(app, body, lock_at_least_for=50)
    task.backend.store_result("three", None, "SUCCESS")

    deliver(task, id="three", delivery_info={"redelivered": True})

    assert task.AsyncResult("three").state == "SUCCESS"
    assert store.holder(key_of(task)) is None


def test_a_newer_release_may_say_more_of_a_run_that_waits():
    request = SimpleNamespace(
        headers={HEADER: [1.0, 2, True, None, 7, 1, "theirs", 0.5, "new"]}, delivery_info=None
    )

    assert Waiting.of(request) == Waiting(1.0, 2, True, None, 7, 1, "theirs", 0.5)
