"""What a publish does when its phase begins there. The broker is kombu's, in memory."""

from __future__ import annotations

from copy import copy
from datetime import datetime, timedelta, timezone

import django
import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import Retry
from celery.result import EagerResult
from django.db import transaction
from kombu.exceptions import EncodeError

import django_settings
from absent_store import AbsentStore
from celery_singleton_lock import ConfigurationError, LockHeldError, SingletonTask, phases
from celery_singleton_lock.django import DjangoSingletonTask
from celery_singleton_lock.keys import queued_key
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.publishing import RESERVED
from celery_singleton_lock.stores.base import Claimant
from fake_clock import FakeClock

LIFETIME, QUEUED = "lifetime", "queued_and_running"


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def app(clock):
    app = Celery("shop", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.update(singleton_store_url="memory://", task_default_queue=f"queue-{id(app)}")
    AppLocks.of(app).store = store = AbsentStore(clock=clock)
    store.is_shared_between_processes = True  # as Redis is
    yield app
    with app.connection_for_write() as connection:
        connection.default_channel.queue_purge(app.conf.task_default_queue)


@pytest.fixture
def store(app):
    return AppLocks.of(app).store


@pytest.fixture
def sent(app):
    """The task ids of all messages that were published and nobody has taken."""

    def sent():
        with app.connection_for_write() as connection:
            queue = connection.SimpleQueue(app.conf.task_default_queue)
            messages = []
            while queue.qsize():
                messages.append(queue.get_nowait())
            for message in messages:
                message.requeue()
            return [message.headers["id"] for message in messages]

    return sent


def buy(sku, count=1):
    return sku


def publish_again(self, sku):
    """A body that is bound."""


def new_task(app, body=buy, base=SingletonTask, **options):
    options = {"name": "shop.task", "shared": False, "base": base, **options}
    return app.task(**options)(body)


def key_of(task, *args):
    return task._lock_options.key("singleton:", args, {})


def starts(task, result, *args):
    """Its worker gets the message, and the run has its lock now."""
    options = task._lock_options
    claimant = Claimant(result.id, "celery@here", 1, options.call(args, {}))
    request = type("Request", (), {"headers": {RESERVED: reserved_by(task, *args)}})
    reserved = phases.reserved_beside(options, request, key_of(task, *args))
    store = AppLocks.of(task.app).store
    answer = store.acquire(key_of(task, *args), result.id, 60.0, claimant, reserved=reserved)
    assert answer.is_acquired


def reserved_by(task, *args):
    return phases.reserved_key(task._lock_options, key_of(task, *args))


# what a second publish does ----------------------------------------------------------------------


@pytest.mark.parametrize("phase", [LIFETIME, QUEUED])
def test_a_second_publish_returns_the_firsts_result_and_publishes_nothing(app, sent, phase):
    task = new_task(app, lock_phase=phase)

    first, second = task.delay("anvil"), task.delay("anvil")

    assert sent() == [first.id]
    assert second.id == first.id
    assert (first.is_duplicate, first.holder) == (False, None)
    assert second.is_duplicate
    assert second.holder.task_id == first.id


@pytest.mark.parametrize("phase", [LIFETIME, QUEUED])
def test_the_same_call_spelt_otherwise_is_a_duplicate_and_another_is_none(app, sent, phase):
    task = new_task(app, lock_phase=phase)

    first = task.delay("anvil")
    assert task.apply_async(kwargs={"sku": "anvil", "count": 1}).is_duplicate
    other = task.delay("rope")

    assert not other.is_duplicate
    assert sent() == [first.id, other.id]


def test_without_a_phase_every_call_is_published_and_none_is_a_duplicate(app, sent):
    task = new_task(app)

    results = [task.delay("anvil"), task.delay("anvil")]

    assert sent() == [each.id for each in results]
    assert [(each.is_duplicate, each.holder) for each in results] == [(False, None)] * 2


def test_for_its_lifetime_a_call_is_a_duplicate_of_the_run_too(app, sent):
    task = new_task(app, lock_phase=LIFETIME)
    first = task.delay("anvil")
    starts(task, first, "anvil")

    second = task.delay("anvil")

    assert second.is_duplicate
    assert second.holder.worker == "celery@here"
    assert sent() == [first.id]


def test_beside_the_one_that_runs_one_more_may_wait(app, sent):
    task = new_task(app, lock_phase=QUEUED)
    first = task.delay("anvil")
    starts(task, first, "anvil")

    second, third = task.delay("anvil"), task.delay("anvil")

    assert not second.is_duplicate
    assert third.holder.task_id == second.id
    assert sent() == [first.id, second.id]


def test_after_the_run_a_call_is_published_again(app, store, sent):
    task = new_task(app, lock_phase=LIFETIME)
    first = task.delay("anvil")
    starts(task, first, "anvil")
    store.release(key_of(task, "anvil"), first.id)

    assert not task.delay("anvil").is_duplicate


def test_under_fail_the_caller_of_a_duplicate_gets_an_error(app, sent):
    task = new_task(app, lock_phase=LIFETIME, on_conflict="fail")
    first = task.delay("anvil")

    with pytest.raises(LockHeldError, match="not published") as raised:
        task.delay("anvil")

    assert raised.value.holder.task_id == first.id
    assert sent() == [first.id]


@pytest.mark.parametrize(
    ("on_conflict", "is_published"),
    [("skip", False), ("wait", True), ("requeue", True), (lambda conflict: "skip", True)],
)
def test_another_call_under_the_same_lock_is_left_out_only_if_the_task_says_skip(
    app, sent, on_conflict, is_published
):
    task = new_task(app, lock_phase=LIFETIME, lock_args="sku", on_conflict=on_conflict)
    first = task.delay("anvil", 1)

    same, other = task.delay("anvil", 1), task.delay("anvil", 2)

    assert same.is_duplicate
    assert other.is_duplicate is not is_published
    assert sent() == [first.id, *([other.id] if is_published else [])]


def test_one_queued_per_call_under_a_shared_lock(app, sent):
    task = new_task(app, lock_phase=QUEUED, lock_args="sku")
    first = task.delay("anvil", 1)

    other = task.delay("anvil", 2)

    assert not other.is_duplicate
    assert sent() == [first.id, other.id]


def test_a_lock_that_is_held_by_hand_has_no_result_so_the_call_is_published(app, sent):
    task = new_task(app, lock_phase=LIFETIME)

    with task.lock("anvil"):
        result = task.delay("anvil")

    assert not result.is_duplicate
    assert sent() == [result.id]


def test_a_run_may_publish_its_own_successor(app, sent):
    task = new_task(app, lock_phase=LIFETIME, bind=True, body=publish_again)
    first = task.delay("anvil")
    starts(task, first, "anvil")

    task.push_request(id=first.id)
    app.set_current()
    try:
        from celery._state import _task_stack

        _task_stack.push(task)
        successor = task.delay("anvil")
    finally:
        _task_stack.pop()
        task.pop_request()

    assert not successor.is_duplicate
    assert successor.id in sent()


def test_a_run_whose_result_is_there_is_no_reason_to_leave_a_call_out(app, sent):
    task = new_task(app, lock_phase=LIFETIME)
    first = task.delay("anvil")
    starts(task, first, "anvil")
    app.backend.store_result(first.id, "done", "SUCCESS")

    second = task.delay("anvil")

    assert not second.is_duplicate
    assert sent() == [first.id, second.id]


# what is always published ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [LIFETIME, QUEUED])
@pytest.mark.parametrize("what", ["task_id", "link", "link_error", "chain"])
def test_a_call_that_somebody_waits_for_is_published_all_the_same(app, sent, phase, what):
    task = new_task(app, lock_phase=phase)
    first = task.delay("anvil")

    values = {"task_id": "its own id", "chain": [task.si("rope")]}
    value = values.get(what, task.si("rope"))
    second = task.apply_async(("anvil",), **{what: value})

    assert not second.is_duplicate
    assert sent() == [first.id, second.id]


def test_members_of_a_canvas_are_published_all_the_same(app, sent):
    task = new_task(app, lock_phase=LIFETIME)
    first = task.delay("anvil")

    group([task.si("anvil"), task.si("anvil")], app=app).apply_async()
    assert len(sent()) == 3
    chain(task.si("anvil"), task.si("anvil"), app=app).apply_async()
    assert len(sent()) == 4
    chord([task.si("anvil"), task.si("anvil")], task.si("anvil"), app=app).apply_async()

    assert len(sent()) == 6
    assert first.id in sent()


def test_a_signature_is_a_plain_call(app, sent):
    task = new_task(app, lock_phase=LIFETIME)

    first, second = task.si("anvil").delay(), task.si("anvil").apply_async()

    assert second.is_duplicate
    assert sent() == [first.id]


def test_what_other_processes_cannot_see_is_not_reserved(app, store, sent):
    store.is_shared_between_processes = False
    task = new_task(app, lock_phase=LIFETIME)

    results = [task.delay("anvil"), task.delay("anvil")]

    assert sent() == [each.id for each in results]
    assert store.holder(key_of(task, "anvil")) is None


def test_who_does_not_call_the_task_reserves_nothing(app, store, sent):
    task = new_task(app, lock_phase=LIFETIME)

    app.send_task("shop.task", ("anvil",))
    app.send_task("shop.task", ("anvil",))

    assert len(sent()) == 2
    assert store.holder(key_of(task, "anvil")) is None


def test_eager_runs_reserve_nothing(app, store):
    app.conf.task_always_eager = True
    task = new_task(app, lock_phase=LIFETIME)

    results = [task.delay("anvil"), task.delay("anvil")]

    assert [each.get() for each in results] == ["anvil"] * 2
    assert [each.is_duplicate for each in results] == [False] * 2
    assert isinstance(results[0], EagerResult)
    assert store.asked == 2 * 2, "to take it and to give it back"


# how long it is reserved -------------------------------------------------------------------------


def in_future(seconds):
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({}, 100.0),
        ({"countdown": 50}, 150.0),
        ({"eta": lambda: in_future(50)}, 150.0),
        ({"eta": lambda: in_future(50).isoformat()}, 150.0),
        ({"eta": lambda: in_future(50).replace(tzinfo=None)}, 150.0),
        ({"expires": 70}, 70.0),
        ({"expires": lambda: in_future(70)}, 70.0),
        ({"expires": 700}, 100.0),
        ({"expires": 120, "countdown": 50}, 120.0),
    ],
)
def test_a_lost_message_is_waited_for_so_long(app, clock, message, expected):
    task = new_task(app, lock_phase=LIFETIME, lock_reservation_ttl=100.0)
    message = {name: value() if callable(value) else value for name, value in message.items()}
    task.apply_async(("anvil",), **message)

    clock.advance(expected - 2)
    assert task.delay("anvil").is_duplicate
    clock.advance(4)
    assert not task.delay("anvil").is_duplicate


def test_a_task_that_expires_is_not_waited_for_any_longer(app, clock):
    task = new_task(app, lock_phase=LIFETIME, expires=70)
    task.delay("anvil")

    clock.advance(72)

    assert not task.delay("anvil").is_duplicate


def test_it_is_an_hour_unless_the_app_or_the_task_says_otherwise(app):
    assert new_task(app).lock_reservation_ttl == 3600.0
    app.conf.singleton_lock_reservation_ttl = 60
    assert new_task(app, name="shop.second").lock_reservation_ttl == 60.0
    own = new_task(app, name="shop.third", lock_reservation_ttl=timedelta(minutes=2))
    assert own.lock_reservation_ttl == 120.0


# when something goes wrong -----------------------------------------------------------------------


def test_what_cannot_be_published_is_not_reserved(app, store, sent):
    task = new_task(app, lock_phase=LIFETIME)

    with pytest.raises(EncodeError):
        task.delay({"a set"})  # which has a key, but no JSON

    assert store.holder(key_of(task, {"a set"})) is None
    assert sent() == []


def test_what_the_caller_has_to_do_with_errors_elsewhere_is_of_no_matter(app, store):
    task = new_task(app, lock_phase=LIFETIME)

    try:
        raise ConnectionResetError("of some other server")
    except ConnectionResetError:
        with pytest.raises(EncodeError):
            task.delay({"a set"})

    assert store.holder(key_of(task, {"a set"})) is None


def test_what_was_interrupted_may_be_published_and_stays_reserved(app, store, monkeypatch):
    task = new_task(app, lock_phase=LIFETIME)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "send_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        task.delay("anvil")

    assert store.holder(key_of(task, "anvil")) is not None


def test_what_was_interrupted_while_it_was_reserved_is_given_back(app, store, monkeypatch):
    task = new_task(app, lock_phase=LIFETIME)
    reserve = store.reserve

    def reserve_and_stop(*args):
        reserve(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "reserve", reserve_and_stop)
    with pytest.raises(KeyboardInterrupt):
        task.delay("anvil")

    assert store.holder(key_of(task, "anvil")) is None


def test_while_the_store_is_away_every_call_is_published(app, store, sent, caplog):
    task = new_task(app, lock_phase=LIFETIME)
    store.is_away = True

    results = [task.delay("anvil"), task.delay("anvil")]

    assert sent() == [each.id for each in results]
    assert not any(each.is_duplicate for each in results)
    assert caplog.text.count("are published whatever is reserved") == 1, "once per outage"


def test_a_lost_reply_leaves_no_reservation_without_its_message(app, store, sent):
    task = new_task(app, lock_phase=LIFETIME)
    store.loses_replies = True
    first = task.delay("anvil")
    store.loses_replies = False

    assert sent() == [first.id]
    assert task.delay("anvil").holder.task_id == first.id


def test_the_callers_own_headers_are_sent_too(app, sent):
    task = new_task(app, lock_phase=LIFETIME)

    task.apply_async(("anvil",), headers={"mine": 1})

    with app.connection_for_write() as connection:
        message = connection.SimpleQueue(app.conf.task_default_queue).get_nowait()
        assert message.headers["mine"] == 1
        assert message.headers[RESERVED] == key_of(task, "anvil")
        message.requeue()


def test_a_copy_of_a_result_tells_it_too(app):
    task = new_task(app, lock_phase=LIFETIME)
    task.delay("anvil")

    copied = copy(task.delay("anvil"))

    assert copied.is_duplicate
    assert copied.holder.worker


def test_an_eager_retry_is_promised_nothing(app, store):
    app.conf.task_always_eager = True

    def again(self, sku):
        raise self.retry()

    task = new_task(app, again, bind=True, lock_phase=LIFETIME)
    with pytest.raises(Retry):
        task.apply(("anvil",), throw=True)

    assert store.holder(key_of(task, "anvil")) is None


def test_arguments_that_do_not_fit_are_celerys_to_refuse(app, store, sent):
    task = new_task(app, lock_phase=LIFETIME)

    with pytest.raises(TypeError):
        task.delay()

    assert sent() == []


# options -----------------------------------------------------------------------------------------


def test_a_phase_that_does_not_exist_is_an_error(app):
    with pytest.raises(ConfigurationError, match="'lifetime'"):
        new_task(app, lock_phase="lifetme").name  # noqa: B018


@pytest.mark.parametrize("on_conflict", ["skip", "fail", "rerun", "join", lambda conflict: "wait"])
def test_what_was_promised_to_a_publish_is_not_dropped_at_the_start(app, on_conflict):
    with pytest.raises(ConfigurationError, match="'requeue'"):
        new_task(app, lock_phase=QUEUED, on_conflict=on_conflict).name  # noqa: B018


def test_one_that_waits_in_its_queue_goes_back_there_by_default(app):
    assert new_task(app, lock_phase=QUEUED).on_conflict == "requeue"
    assert new_task(app, name="other", lock_phase=QUEUED, on_conflict="wait").on_conflict == "wait"


def test_where_locks_are_switched_off_nothing_is_reserved(app, store, sent):
    task = new_task(app, lock_phase=LIFETIME)
    app.conf.singleton_enabled = False

    results = [task.delay("anvil"), task.delay("anvil")]

    assert len(sent()) == 2
    assert not any(each.is_duplicate for each in results)


# Django ------------------------------------------------------------------------------------------


def test_what_is_published_on_commit_is_reserved_at_commit(app, store, sent, monkeypatch):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", django_settings.__name__)
    django.setup()
    task = new_task(app, base=DjangoSingletonTask, lock_phase=LIFETIME)

    with transaction.atomic():
        task.delay_on_commit("anvil")
        assert store.holder(key_of(task, "anvil")) is None
        in_between = task.delay("anvil")

    assert not in_between.is_duplicate
    assert sent() == [in_between.id], "at commit it was a duplicate"


def test_where_the_queue_is_noted_is_in_the_slot_of_its_lock():
    assert queued_key("shop:{7}:1:task:d1") == "shop:{7}:queued:1:task:d1"
