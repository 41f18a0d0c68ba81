"""What a delivery that meets a held lock asks the store, and what it takes back to its queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from celery import Celery, states
from celery.app.trace import build_tracer

from celery_singleton_lock import SingletonTask, lock_refused
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.publishing import HEADER, Waiting
from celery_singleton_lock.stores.base import MOST_PASSES, PLACE_LIVES, Claimant, Place

OTHER = Claimant("other", "celery@there", 12)


class Fate(NamedTuple):
    """What became of a delivery.

    Attributes:
        state: As Celery stores it, or IGNORED.
        waiting: As the message that went back to the queue tells it, if one did.
        asked: How often the store was asked.
        refusals: What the signal told.
    """

    state: str | None
    waiting: Waiting | None
    asked: int
    refusals: list[str]


@pytest.fixture
def app(store):
    app = Celery("tests", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.singleton_store_url = "memory://"
    app.conf.task_default_queue = uuid4().hex  # a broker in memory is the whole process's
    AppLocks.of(app).store = store
    yield app
    app.close()


class Booking:
    """A task, and a lock that another run has."""

    def __init__(self, app: Celery, store: Any, **options: Any) -> None:
        self._app, self._store = app, store
        self.task = app.task(base=SingletonTask, name="book", shared=False, **options)(book)
        self.key = self.task._lock_options.key("singleton:", (), {})
        store.acquire(self.key, "other", 60.0, OTHER)

    def deliver(self, waiting: Waiting | None = None, **request: Any) -> Fate:
        """Run the task as a worker does that gets a message for it."""
        headers = {HEADER: list(vars(waiting).values())} if waiting else {}
        request = {"id": "mine", "headers": headers, "delivery_info": {}, **request}
        self._store.asked = 0
        refusals = []

        def note(sender, event, **_):
            refusals.append(event.outcome)

        lock_refused.connect(note)
        info = build_tracer("book", self.task, app=self._app)("mine", (), {}, request).info
        lock_refused.disconnect(note)
        state = info.state if info else states.SUCCESS
        return Fate(state, self._sent(), self._store.asked, refusals)

    def _sent(self) -> Waiting | None:
        name = self._app.conf.task_default_queue
        with self._app.connection() as connection, connection.SimpleQueue(name) as queue:
            if not queue.qsize():
                return None
            message = queue.get_nowait()
            message.ack()
            return Waiting(*message.headers[HEADER])

    def new_one_is_let_in(self) -> bool:
        """Whether somebody who stands nowhere gets the lock now."""
        return self._store.acquire(self.key, "new", 60.0, OTHER).is_acquired


def book():
    return "booked"


@pytest.fixture
def new_booking(app, store):
    return lambda **options: Booking(app, store, **options)


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_who_is_sent_away_asks_once_and_stands_nowhere(new_booking, store, clock, policy):
    booking = new_booking(on_conflict=policy)

    fate = booking.deliver()
    clock.advance(0.01)
    store.release(booking.key, "other")

    assert (fate.asked, fate.refusals, fate.waiting) == (1, [policy], None)
    assert booking.new_one_is_let_in()


def test_who_goes_back_asks_once_and_takes_its_place_along(new_booking, store, clock):
    booking = new_booking(on_conflict="requeue")

    fate = booking.deliver()
    clock.advance(1.0)  # it is due by now
    store.release(booking.key, "other")

    assert (fate.asked, fate.refusals) == (1, ["requeue"])
    assert fate.waiting.place > 0
    assert not booking.new_one_is_let_in()
    assert booking.deliver(fate.waiting).state == states.SUCCESS


def test_who_has_gone_without_its_lock_for_too_long_leaves_the_line(new_booking, store, clock):
    booking = new_booking(on_conflict="requeue", wait_timeout=1)
    first = booking.deliver()

    fate = booking.deliver(replace(first.waiting, since=1.0))
    clock.advance(0.2)
    store.release(booking.key, "other")

    assert (fate.state, fate.refusals) == (states.FAILURE, ["fail"])
    assert booking.new_one_is_let_in()


def test_who_comes_back_stands_where_it_stood(new_booking, store, clock):
    booking = new_booking(on_conflict="requeue")
    first = booking.deliver()
    clock.advance(1.0)

    again = booking.deliver(first.waiting)

    assert again.waiting.place == first.waiting.place
    assert again.waiting.requeues == 2


def test_a_retry_goes_back_with_a_place_whatever_its_policy(new_booking):
    fate = new_booking(on_conflict="skip").deliver(retries=1)

    assert (fate.asked, fate.refusals) == (1, ["requeue"])
    assert fate.waiting.place > 0


def test_a_callable_is_asked_once_and_its_run_takes_a_place_when_it_has_answered(new_booking):
    conflicts = []

    def decide(conflict):
        conflicts.append(conflict)
        return "requeue"

    fate = new_booking(on_conflict=decide).deliver()

    assert (fate.asked, fate.refusals) == (2, ["requeue"])
    assert fate.waiting.place > 0
    assert [each.holder.task_id for each in conflicts] == ["other"]


def test_a_callable_can_have_its_run_stand_in_line(new_booking, store, monkeypatch):
    def decide(conflict):
        return "wait"

    booking = new_booking(on_conflict=decide)

    def await_turn(key, place, seconds):
        store.release(key, "other")

    monkeypatch.setattr(store, "await_turn", await_turn)
    fate = booking.deliver()

    assert (fate.state, fate.refusals) == (states.SUCCESS, ["wait"])


def test_a_run_that_waits_goes_back_with_its_place_when_its_worker_stops(
    app, new_booking, store, monkeypatch
):
    booking = new_booking(on_conflict="wait")

    def await_turn(key, place, seconds):
        AppLocks.of(app).stop_flag.set(True)

    monkeypatch.setattr(store, "await_turn", await_turn)
    before = store.acquire(booking.key, "before", 60.0, OTHER._replace(task_id="x"), Place())
    fate = booking.deliver()

    assert (fate.state, fate.refusals) == (states.IGNORED, ["wait", "requeue"])
    assert fate.waiting.place > before.place.number


def test_a_run_that_waits_takes_its_place_along_when_the_store_goes_away(
    new_booking, store, clock, monkeypatch
):
    booking = new_booking(on_conflict="wait")

    def await_turn(key, place, seconds):
        store.is_away = True

    monkeypatch.setattr(store, "await_turn", await_turn)
    fate = booking.deliver()

    assert fate.state == states.IGNORED
    assert fate.waiting.place > 0
    assert fate.waiting.away_since is not None
    store.is_away = False
    clock.advance(PLACE_LIVES)
    store.release(booking.key, "other")
    assert booking.deliver(fate.waiting).state == states.SUCCESS


def test_a_run_that_is_its_own_holder_takes_no_place(new_booking, store):
    booking = new_booking(on_conflict="requeue")
    store.release(booking.key, "other")
    store.acquire(booking.key, "first copy", 60.0, OTHER._replace(task_id="mine"))

    fate = booking.deliver()

    assert (fate.asked, fate.refusals, fate.waiting.place) == (1, ["requeue"], 0)


def test_a_run_that_finds_the_lock_free_as_it_is_about_to_go_back_runs(
    new_booking, store, monkeypatch
):
    def decide(conflict):
        store.release(conflict.lock_key, "other")
        return "requeue"

    fate = new_booking(on_conflict=decide).deliver()

    assert (fate.state, fate.waiting) == (states.SUCCESS, None)


@pytest.fixture
def often_passed(new_booking, store):
    """A booking that has seen others let in often enough, and what it says of itself."""
    booking = new_booking(on_conflict="requeue")
    place = store.acquire(booking.key, "mine", 60.0, OTHER._replace(task_id="mine"), Place()).place
    for _ in range(MOST_PASSES):
        store._count_served(booking.key, True)
    return booking, Waiting(since=1.0, requeues=1, place=place.number)


def test_who_has_been_passed_often_stays_awake_for_a_moment(often_passed, store, monkeypatch):
    booking, waiting = often_passed

    def await_turn(key, place, seconds):
        store.release(key, "other")

    monkeypatch.setattr(store, "await_turn", await_turn)
    fate = booking.deliver(waiting)

    assert (fate.state, fate.waiting) == (states.SUCCESS, None)


def test_nobody_stays_awake_for_a_lock_that_is_kept_for_a_retry(often_passed, store, monkeypatch):
    booking, waiting = often_passed
    store.hold(booking.key, "other", 60.0)
    store.release(booking.key, "other")

    def await_turn(key, place, seconds):
        raise AssertionError("it must not wait")

    monkeypatch.setattr(store, "await_turn", await_turn)
    fate = booking.deliver(waiting)

    assert (fate.state, fate.waiting.place) == (states.IGNORED, waiting.place)


def test_who_stays_awake_goes_when_another_copy_of_its_message_has_the_lock(
    often_passed, store, monkeypatch
):
    booking, waiting = often_passed

    def await_turn(key, place, seconds):
        store.lose_data()
        store.acquire(key, "copy", 60.0, OTHER._replace(task_id="mine"))

    monkeypatch.setattr(store, "await_turn", await_turn)
    fate = booking.deliver(waiting)

    assert (fate.state, fate.asked) == (states.IGNORED, 4)  # three times, and the copy once


@pytest.mark.parametrize("policy", ["requeue", "wait"])
def test_time_behind_its_own_lock_is_no_waiting(new_booking, store, policy):
    booking = new_booking(on_conflict=policy, wait_timeout=60)
    store.lose_data()
    store.acquire(booking.key, "copy", 60.0, OTHER._replace(task_id="mine"))

    fate = booking.deliver(Waiting(since=1.0, requeues=9))

    assert (fate.state, fate.waiting.since) == (states.IGNORED, None)


@pytest.fixture
def new_link(app):
    """Makes results of tasks that are to follow a run."""
    return lambda: app.AsyncResult(str(uuid4()))


@pytest.mark.parametrize("answer", ["ignore", KeyError("sku")], ids=["no policy", "an error"])
def test_a_callable_that_answers_with_no_policy_fails_its_run_and_who_would_have_followed(
    new_booking, new_link, answer
):
    def on_conflict(conflict):
        if isinstance(answer, Exception):
            raise answer
        return answer

    booking, link = new_booking(on_conflict=on_conflict), new_link()

    fate = booking.deliver(callbacks=[booking.task.si().set(task_id=link.id)])

    assert (fate.state, link.state) == (states.FAILURE, states.FAILURE)


def test_one_outcome_that_cannot_be_stored_does_not_keep_the_others_from_theirs(
    new_booking, new_link, app, monkeypatch
):
    booking, first, second = new_booking(on_conflict="skip"), new_link(), new_link()
    store_result = app.backend.store_result

    def store_all_but_the_first(task_id, *args, **kwargs):
        if task_id == first.id:
            raise OSError("no space left")
        return store_result(task_id, *args, **kwargs)

    monkeypatch.setattr(app.backend, "store_result", store_all_but_the_first)
    fate = booking.deliver(
        callbacks=[booking.task.si().set(task_id=link.id) for link in (first, second)]
    )

    assert (fate.state, first.state) == (states.IGNORED, states.PENDING)
    assert second.state == states.REVOKED


def test_the_outcome_of_who_has_had_its_turn_already_stays(new_booking, new_link, app):
    booking, link = new_booking(on_conflict="skip"), new_link()
    app.backend.store_result(link.id, KeyError("sku"), states.FAILURE)

    booking.deliver(callbacks=[booking.task.si().set(task_id=link.id)])

    assert link.state == states.FAILURE
