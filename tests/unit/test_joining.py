"""How a run that has joined another one comes by its outcome, and what joining asks of a task."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery, Task, shared_task, states
from celery.app.trace import build_tracer

from celery_singleton_lock import (
    ConfigurationError,
    SingletonTask,
    lock_acquired,
    lock_refused,
    lock_released,
)
from celery_singleton_lock.joining import JOIN_GRACE
from celery_singleton_lock.lease import NullLease
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.publishing import HEADER, Waiting
from celery_singleton_lock.stores.base import Claimant, Place

#: The header of a run that has joined the one with the id "theirs".
JOINED = Waiting(since=1.0, requeues=3, joined="theirs")
GRACE_OVER = Waiting(since=1.0, requeues=9, joined="theirs", free_for=JOIN_GRACE)


def new_app(**options):
    app = Celery("shop", set_as_current=False, broker="memory://", **options)
    app.conf.singleton_store_url = "memory://"
    app.conf.task_default_queue = uuid4().hex  # a broker in memory is the whole process's
    return app


@pytest.fixture
def app(store):
    app = new_app(backend="cache+memory://")
    AppLocks.of(app).store = store
    app.backend.client.cache.clear()  # it is the whole process's
    yield app
    app.close()


class Fate(NamedTuple):
    """What became of a delivery.

    Attributes:
        state: As Celery stores it, or IGNORED.
        value: What the run came to.
        waiting: As the message that went back to the queue tells it, if one did.
        asked: How often the store was asked.
        signals: What was told of the lock.
    """

    state: str
    value: Any
    waiting: Waiting | None
    asked: int
    signals: list[str]


class Scene:
    """A task that joins, and what becomes of its deliveries."""

    def __init__(self, app, store, **options):
        self.app, self.store = app, store
        options = {"base": SingletonTask, "on_conflict": "join", **options}
        app.task(name="price", shared=False, bind=True, **options)(price)
        app.finalize()
        self.task = app.tasks["price"]
        self.task.calls = []
        options = self.task._lock_options
        self.key = options.key("singleton:", ("anvil",), {})
        self._call = options.call(("anvil",), {})

    def hold(self, task_id="theirs", call=None):
        """Somebody else takes the lock: a run of the same call, if nothing else is said."""
        call = self._call if call is None else call
        claimant = Claimant(task_id, "celery@there", 7, call)
        assert self.store.acquire(self.key, task_id, 60.0, claimant).is_acquired

    def deliver(self, waiting=None, task_id="mine", **request):
        """Run the task as a worker does that gets a message for it."""
        headers = {HEADER: list(astuple(waiting))} if waiting else {}
        request = {"id": task_id, "headers": headers, "delivery_info": {}, **request}
        self.store.asked, told = 0, []

        def note(signal, event, **_):
            told.append(event.outcome or signal.name)

        for each in (lock_acquired, lock_refused, lock_released):
            each.connect(note)
        try:
            answer = build_tracer("price", self.task, app=self.app)(
                task_id, ("anvil",), {}, request
            )
        finally:
            for each in (lock_acquired, lock_refused, lock_released):
                each.disconnect(note)
        state = answer.info.state if answer.info else states.SUCCESS
        value = answer.info.retval if answer.info else answer.retval
        return Fate(state, value, self._sent(), self.store.asked, told)

    def end(self, result, state=states.SUCCESS, task_id="theirs"):
        """Have the outcome of another run stored."""
        self.app.backend.store_result(task_id, result, state)

    def _sent(self):
        name = self.app.conf.task_default_queue
        with self.app.connection() as connection, connection.SimpleQueue(name) as queue:
            if not queue.qsize():
                return None
            message = queue.get_nowait()
            message.ack()
            return Waiting(*message.headers[HEADER])


def body(sku, extra=None):
    """What a task is made of where nothing is to happen."""
    return sku


def price(self, sku, currency="€"):
    self.calls.append(sku)
    return "its own"


@pytest.fixture
def new_scene(app, store):
    return lambda **options: Scene(app, store, **options)


@pytest.fixture
def scene(new_scene):
    return new_scene()


# In the queue ---------------------------------------------------------------------------------


def test_who_meets_the_same_call_goes_back_to_the_queue_without_a_place(scene):
    scene.hold()

    fate = scene.deliver()

    assert (fate.state, fate.asked, fate.signals) == (states.IGNORED, 1, ["join"])
    assert (fate.waiting.joined, fate.waiting.place) == ("theirs", 0)


def test_who_stood_in_line_for_another_call_leaves_the_line_when_it_joins(scene, clock):
    scene.hold("another", call="another call")
    first = scene.deliver()
    assert (first.waiting.joined, first.signals) == ("", ["requeue"])
    assert first.waiting.place > 0
    clock.advance(1.0)
    scene.store.lose_data()
    scene.hold()

    fate = scene.deliver(first.waiting)

    assert (fate.waiting.joined, fate.waiting.place) == ("theirs", 0)
    clock.advance(0.1)
    scene.store.release(scene.key, "theirs")
    scene.hold("new")


def test_who_meets_another_call_meanwhile_stands_in_line_and_still_looks_for_the_outcome(scene):
    scene.hold("another", call="another call")

    fate = scene.deliver(JOINED)
    scene.end("shared")

    assert (fate.signals, fate.waiting.joined) == (["requeue"], "theirs")
    assert fate.waiting.place > 0
    assert scene.deliver(fate.waiting).value == "shared"


def test_who_has_joined_goes_back_as_long_as_there_is_no_outcome(scene):
    scene.hold()

    fate = scene.deliver(JOINED)

    assert (fate.state, fate.signals) == (states.IGNORED, ["join"])
    assert (fate.waiting.joined, fate.waiting.requeues) == ("theirs", 4)


def test_who_has_joined_its_parent_does_not_stay_in_its_slot_for_it(scene, monkeypatch):
    scene.hold()

    def await_turn(key, place, seconds):
        raise AssertionError("it must not wait")

    monkeypatch.setattr(scene.store, "await_turn", await_turn)
    fate = scene.deliver(JOINED, parent_id="theirs")

    assert (fate.asked, fate.waiting.joined) == (2, "theirs")


def test_who_has_joined_joins_the_next_run_of_the_same_call(scene):
    scene.hold("next")

    assert scene.deliver(JOINED).waiting.joined == "next"


def test_a_retry_and_a_redelivered_copy_join_too(scene):
    scene.hold()

    assert scene.deliver(retries=1).waiting.joined == "theirs"
    assert scene.deliver(delivery_info={"redelivered": True}).waiting.joined == "theirs"


def test_who_has_joined_does_so_again_after_the_store_was_away(scene, store):
    scene.hold()
    store.is_away = True

    fate = scene.deliver(JOINED)

    assert (fate.state, fate.waiting.joined) == (states.IGNORED, "theirs")
    assert fate.waiting.away_since is not None


# The outcome ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["shared", None, [1, 2]])
def test_a_value_is_shared_without_a_lock_and_without_the_body(scene, value):
    scene.hold()
    scene.end(value)

    fate = scene.deliver(JOINED)

    assert fate == Fate(states.SUCCESS, value, None, 0, [])
    assert scene.task.calls == []
    assert scene.app.AsyncResult("mine").result == value


def test_an_error_is_shared_and_not_retried(new_scene):
    scene = new_scene(autoretry_for=(KeyError,))
    scene.end(KeyError("sku"), states.FAILURE)
    link = scene.app.AsyncResult(str(uuid4()))

    fate = scene.deliver(JOINED, callbacks=[scene.task.si("x").set(task_id=link.id)])

    assert (fate.state, repr(fate.value), fate.signals) == (states.FAILURE, "KeyError('sku')", [])
    assert (fate.waiting, link.state) == (None, states.FAILURE)
    assert scene.task.calls == []


def test_hooks_see_that_there_is_no_lease(new_scene):
    seen = []

    class Hooked(SingletonTask):
        def on_success(self, *args):
            seen.append(self.lease)

    scene = new_scene(base=Hooked)
    scene.end("shared")
    scene.deliver(JOINED)

    assert [type(lease) for lease in seen] == [NullLease]


# No outcome -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "state"),
    [(None, states.PENDING), ({"pid": 7}, states.STARTED), (KeyError("sku"), states.RETRY)],
)
def test_a_free_lock_is_left_alone_for_the_time_of_grace(scene, result, state):
    scene.end(result, state)

    deliveries = [scene.deliver(JOINED)]
    while deliveries[-1].waiting:
        assert deliveries[-1].waiting.joined == "theirs"
        deliveries.append(scene.deliver(deliveries[-1].waiting))

    waits = [each.waiting.free_for for each in deliveries[:-1]]
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(JOIN_GRACE)
    assert deliveries[-1].value == "its own"
    assert deliveries[-1].signals == ["lock_acquired", "lock_released"]


def test_time_of_grace_begins_anew_when_the_lock_was_taken_again(scene):
    scene.hold()

    assert scene.deliver(GRACE_OVER).waiting.free_for == 0.0


@pytest.mark.parametrize(
    ("result", "state"),
    [
        (KeyError("x"), states.REVOKED),
        (WorkerLostError("killed"), states.FAILURE),
        (
            {"exc_type": "SystemExit", "exc_module": "builtins", "exc_message": [1]},
            states.FAILURE,
        ),
    ],
)
def test_there_is_no_grace_where_no_outcome_can_come(scene, result, state):
    scene.end(result, state)

    assert scene.deliver(JOINED).value == "its own"


def test_who_stands_in_line_does_not_wait_for_the_grace(scene, store):
    store.acquire(scene.key, "x", 60.0, Claimant("x", "there", 7))
    place = store.acquire(scene.key, "mine", 60.0, Claimant("mine", "here", 7), Place()).place
    store.release(scene.key, "x")
    store.lose_data()

    fate = scene.deliver(JOINED.at_conflict(place))

    assert fate.value == "its own"


def test_an_outcome_that_comes_as_the_lock_becomes_free_is_taken(scene, store, monkeypatch):
    def holder(key):
        scene.end("shared")

    monkeypatch.setattr(store, "holder", holder)

    assert scene.deliver(JOINED).value == "shared"


def test_of_several_that_run_in_the_place_of_one_the_first_has_its_body_run(scene):
    first = scene.deliver(GRACE_OVER, task_id="first")

    second = scene.deliver(GRACE_OVER, task_id="second")

    assert (first.value, second.value) == ("its own", "its own")
    assert second.signals == []
    assert scene.task.calls == ["anvil"]
    scene.hold("new")  # the lock was given back


def test_who_finds_an_outcome_with_the_lock_in_hand_keeps_it_until_its_own_is_stored(scene):
    held = []
    scene.deliver(GRACE_OVER, task_id="first")
    store_result = scene.app.backend.store_result

    def note(*args, **kwargs):
        held.append(scene.store.holder(scene.key).task_id)
        return store_result(*args, **kwargs)

    scene.app.backend.store_result = note
    scene.deliver(GRACE_OVER, task_id="second")

    assert held == ["second"]
    assert scene.store.holder(scene.key) is None


def test_a_redelivered_copy_of_the_first_runs_again(scene):
    scene.deliver(GRACE_OVER, task_id="first")
    scene.app.backend.forget("first")
    scene.end(KeyError("acks_on_timeout=False"), states.FAILURE, task_id="first")

    assert scene.deliver(GRACE_OVER, task_id="first").value == "its own"
    assert scene.task.calls == ["anvil"] * 2


def test_if_the_first_leaves_no_outcome_either_another_one_runs(scene):
    scene.deliver(GRACE_OVER, task_id="first")
    scene.app.backend.forget("first")

    second = scene.deliver(GRACE_OVER, task_id="second")
    third = scene.deliver(GRACE_OVER, task_id="third")

    assert (second.signals, third.signals) == (["lock_acquired", "lock_released"], [])


def test_two_that_have_joined_each_other_do_not_go_round_in_circles(scene):
    scene.deliver(GRACE_OVER, task_id="first")
    scene.app.backend.forget("first")
    joined_first = Waiting(since=1.0, requeues=9, joined="first", free_for=JOIN_GRACE)
    scene.deliver(joined_first, task_id="theirs")
    scene.app.backend.forget("theirs")

    assert scene.deliver(GRACE_OVER, task_id="third").value == "its own"


def test_a_store_that_goes_away_with_the_lock_in_hand_costs_no_run(scene, store, monkeypatch):
    acquire = store.acquire

    def acquire_and_go(key, *args):
        store.is_away = "instead" in key
        return acquire(key, *args)

    monkeypatch.setattr(store, "acquire", acquire_and_go)

    assert scene.deliver(GRACE_OVER).value == "its own"


# Calls ----------------------------------------------------------------------------------------


def test_a_direct_call_is_not_a_run(scene):
    assert scene.task("anvil") == "its own"
    assert scene.task.calls == ["anvil"]


def test_a_direct_call_in_a_body_has_a_request_of_its_own_as_without_us(new_scene):
    def tell(self, sku, is_nested=False):
        depth = len(self.request_stack.stack)
        return [depth] if is_nested else [depth, *self(sku, True)]

    ours = new_scene().app.task(
        name="ours", base=SingletonTask, on_conflict="join", bind=True, shared=False
    )(tell)
    plain = ours.app.task(name="plain", bind=True, shared=False)(tell)

    ours, plain = ours.apply(("anvil",)).get(), plain.apply(("anvil",)).get()

    assert ours == plain


def test_a_body_has_the_request_of_its_run_and_no_copy(app):
    seen = []

    class Hooked(SingletonTask):
        def on_success(self, *args):
            seen.append(self.request.mine)

    def task(self):
        self.request.mine = 1

    app.task(base=Hooked, on_conflict="join", bind=True, shared=False)(task).apply().get()

    assert seen == [1]


class InContext(Task):
    """As in Flask's documentation."""

    def __call__(self, *args, **kwargs):
        return "in context", self.run(*args, **kwargs)


class PoliteInContext(Task):
    """The same, and calls the next one."""

    def __call__(self, *args, **kwargs):
        return "in context", super().__call__(*args, **kwargs)


@pytest.mark.parametrize("theirs", [InContext, PoliteInContext])
@pytest.mark.parametrize("is_ours_first", [True, False])
def test_a_call_of_another_base_is_made_and_its_value_is_shared_as_it_is(
    new_scene, theirs, is_ours_first
):
    bases = (SingletonTask, theirs) if is_ours_first else (theirs, SingletonTask)
    scene = new_scene(base=type("Both", bases, {}))
    scene.end(["in context", "shared"])

    assert scene.deliver(task_id="other").value == ("in context", "its own")
    assert scene.task("anvil") == ("in context", "its own")
    assert scene.deliver(JOINED).value == ["in context", "shared"]


def test_only_tasks_that_can_join_have_a_call_of_their_own(new_scene):
    assert "__call__" in vars(type(new_scene(on_conflict="join").task))


@pytest.mark.parametrize("policy", ["skip", "requeue", "wait", "fail"])
def test_the_others_are_called_by_celery_as_without_us(new_scene, policy):
    task = new_scene(on_conflict=policy).task

    assert type(task).__call__ is Task.__call__


def price_class(**attributes):
    def run(self, sku):
        return ["run", sku]

    return type(
        "Price", (SingletonTask,), {"name": "p", "run": run, "__module__": "shop"} | attributes
    )


def joined_value(app, task):
    """What a run of ``task`` that has joined another one comes to."""
    app.backend.store_result("theirs", "shared", states.SUCCESS)
    request = {"id": "mine", "headers": {HEADER: list(astuple(JOINED))}, "delivery_info": {}}
    return build_tracer(task.name, task, app=app)("mine", ("anvil",), {}, request).retval


def own_value(app, task):
    request = {"id": "other", "headers": {}, "delivery_info": {}}
    return build_tracer(task.name, task, app=app)("other", ("anvil",), {}, request).retval


def test_a_class_keeps_its_own_call_also_when_it_is_bound_twice(app):
    def call(self, *args, **kwargs):
        return "own call", self.run(*args, **kwargs)

    task_class = price_class(__call__=call, on_conflict="join")
    task = app.register_task(task_class())
    again = new_app(backend="cache+memory://").register_task(task_class())

    assert again("anvil") == ("own call", ["run", "anvil"])
    assert own_value(app, task) == ("own call", ["run", "anvil"])
    assert joined_value(app, task) == "shared"


@pytest.mark.parametrize("policy", ["join", "skip"])
def test_a_subclass_of_a_bound_class_is_called_once(app, policy):
    parent = price_class(on_conflict="join")
    app.register_task(parent())

    def call(self, *args, **kwargs):
        return "sub", super(child, self).__call__(*args, **kwargs)

    child = type("Child", (parent,), {"name": "c", "on_conflict": policy, "__call__": call})
    task = app.register_task(child())

    assert own_value(app, task) == ("sub", ["run", "anvil"])
    assert task("anvil") == ("sub", ["run", "anvil"])


def test_a_class_that_is_bound_often_and_its_subclass_have_no_copy_of_the_request():
    def run(self, sku):
        return len(self.request_stack.stack)

    parent = price_class(on_conflict="join", run=run)
    for _ in range(3):  # of which the later ones find what the first has left
        app = new_app(backend="cache+memory://")
        assert own_value(app, app.register_task(parent())) == 1

    task = app.register_task(type("Child", (parent,), {"name": "c"})())

    assert own_value(app, task) == 1


@pytest.mark.parametrize("how", ["a class", "task_cls", "an annotation", "a setting"])
def test_a_task_joins_however_it_says_so(store, how):
    app = new_app(backend="cache+memory://")
    options = {"base": SingletonTask}
    if how == "task_cls":
        app = new_app(backend="cache+memory://", task_cls=SingletonTask)
        options = {"on_conflict": "join"}
    elif how == "an annotation":
        app.conf.task_annotations = {"p": {"on_conflict": "join"}}
    elif how == "a setting":
        app.conf.singleton_on_conflict = "join"

    if how == "a class":
        task = app.register_task(price_class(on_conflict="join")())
    else:
        task = app.task(name="p", shared=False, **options)(body)

    assert joined_value(app, task) == "shared"


def test_a_shared_task_joins_in_each_app(shared_tasks_of_this_test):
    @shared_task(base=SingletonTask, name="shop.shared", on_conflict="join")
    def task(sku):
        """The body."""

    for _ in range(2):
        app = new_app(backend="cache+memory://")
        app.finalize()
        assert joined_value(app, app.tasks["shop.shared"]) == "shared"


@pytest.mark.parametrize("policy", ["skip", "requeue"])
def test_a_message_that_has_joined_runs_under_its_lock_where_its_task_joins_no_more(
    new_scene, policy
):
    scene = new_scene(on_conflict=policy)
    scene.end("shared")

    fate = scene.deliver(JOINED)

    assert (fate.value, fate.signals) == ("its own", ["lock_acquired", "lock_released"])


def test_locks_that_are_switched_off_leave_the_call_as_it_is(scene):
    scene.app.conf.singleton_enabled = False
    scene.hold()

    assert scene.deliver().value == "its own"


# What joining asks of a task ------------------------------------------------------------------


def bound(app, **options):
    return app.task(
        **{"base": SingletonTask, "on_conflict": "join", "name": "p", "shared": False, **options}
    )(body).name


@pytest.mark.parametrize("backend", [None, "disabled://"])
def test_to_join_takes_a_result_backend(backend):
    with pytest.raises(ConfigurationError, match=r"'join', but there is no .* set result_backend"):
        bound(new_app(backend=backend))


def test_to_join_takes_one_that_others_can_read():
    with pytest.raises(ConfigurationError, match=r"rpc:// .* only the caller"):
        bound(new_app(backend="rpc://"))


def test_a_task_may_have_a_backend_of_its_own(app):
    assert bound(new_app(), backend=app.backend)


@pytest.mark.parametrize("says_so", ["the task", "the setting"])
def test_to_join_takes_results_that_are_not_ignored(app, says_so):
    app.conf.task_ignore_result = says_so == "the setting"
    options = {"ignore_result": True} if says_so == "the task" else {}

    with pytest.raises(ConfigurationError, match="ignore_result=False"):
        bound(app, **options)


def test_a_callable_may_name_join_where_that_is_possible(new_scene):
    scene = new_scene(on_conflict=lambda conflict: "join" if conflict.is_same_call else "skip")
    scene.hold()

    fate = scene.deliver()
    scene.end("shared")

    assert fate.waiting.joined == "theirs"
    assert scene.deliver(fate.waiting).value == "shared"


def test_a_callable_that_names_it_where_it_is_not_is_told_so_then(new_scene):
    scene = new_scene(on_conflict=lambda conflict: "join", ignore_result=True)
    scene.hold()

    fate = scene.deliver()

    assert fate.state == states.FAILURE
    assert isinstance(fate.value, ConfigurationError)
    assert "returned 'join', but its results are ignored" in str(fate.value)


@pytest.mark.parametrize("on_conflict", ["join", lambda conflict: "join"])
def test_an_eager_app_needs_no_result_backend_since_nobody_waits_in_a_queue(store, on_conflict):
    app = new_app()
    app.conf.task_always_eager = True
    AppLocks.of(app).store = store
    scene = Scene(app, store, on_conflict=on_conflict)

    def await_turn(key, place, seconds):
        store.release(key, "theirs")

    scene.hold()
    store.await_turn = await_turn

    assert scene.task.delay("anvil").get() == "its own"


def test_nor_does_an_eager_run_of_a_task_whose_callable_names_join(store):
    app = new_app()
    AppLocks.of(app).store = store
    scene = Scene(app, store, on_conflict=lambda conflict: "join")
    scene.hold()
    store.await_turn = lambda key, place, seconds: store.release(key, "theirs")

    assert scene.task.apply(("anvil",)).get() == "its own"


def test_arguments_that_have_no_digest_are_nobodys_equals(app):
    task = app.task(
        base=SingletonTask, name="p", shared=False, on_conflict="join", lock_args="sku"
    )(body)

    options = task._lock_options

    assert options.call(("anvil", object()), {}) == ""
    assert options.call(("anvil", 1), {}) != ""
