"""SingletonTask together with other task classes, and with the other ways to make a task.

Runs are eager. What needs a worker is in tests/worker/test_mixing.py.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import celery
import django
import pytest
from celery import Celery, Task, current_task, shared_task
from celery.contrib.django.task import DjangoTask
from django.db import connection, transaction
from flask import Flask, current_app

import django_settings
from celery_singleton_lock import (
    ConfigurationError,
    DuplicateTaskError,
    KeyDerivationError,
    LockHeldError,
    SingletonTask,
)
from celery_singleton_lock.django import DjangoSingletonTask
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.stores.base import Claimant
from orders import Order, place_order

THEM = Claimant("theirs", "celery@there", 7)


def new_app(**options):
    app = Celery("shop", set_as_current=False, broker="memory://", **options)
    app.conf.update(task_always_eager=True, singleton_store_url="memory://")
    return app


@pytest.fixture
def app():
    return new_app()


def new_task(app, body, **options):
    """A task of ``app`` alone: a shared one would be bound to the apps of all later tests."""
    return app.task(**{"name": "shop.task", "bind": True, "shared": False, **options})(body)


def held_by_another(task, *args):
    """Somebody else takes the lock of this call."""
    key = task._lock_options.key("singleton:", args, {})
    assert AppLocks.of(task.app).store.acquire(key, "theirs", 60.0, THEM).is_acquired


# Flask, and other classes with a __call__ -----------------------------------------------------


class FlaskTask(Task):
    """As in Flask's documentation."""

    def __call__(self, *args, **kwargs):
        with Flask("shop").app_context():
            return self.run(*args, **kwargs)


class PoliteFlaskTask(Task):
    """The same, and calls the next one, which makes a request of its own."""

    def __call__(self, *args, **kwargs):
        with Flask("shop").app_context():
            return super().__call__(*args, **kwargs)


def context_and_token(self, sku):
    """What a body sees of Flask and of its lock."""
    return (current_app.name if current_app else None), self.lease.fencing_token


@pytest.mark.parametrize("flask_task", [FlaskTask, PoliteFlaskTask])
@pytest.mark.parametrize("is_ours_first", [True, False])
def test_a_body_has_its_flask_context_and_its_lock_in_both_orders_of_the_bases(
    app, flask_task, is_ours_first
):
    bases = (SingletonTask, flask_task) if is_ours_first else (flask_task, SingletonTask)
    task = new_task(app, context_and_token, base=type("Both", bases, {}))

    context, token = task.delay("anvil").get()
    held_by_another(task, "anvil")

    assert context == "shop"
    assert token > 0
    with pytest.raises(DuplicateTaskError):
        task.delay("anvil").get()


def test_a_direct_call_has_its_flask_context_and_takes_no_lock(app):
    class FlaskSingletonTask(SingletonTask, FlaskTask):
        pass

    task = new_task(app, context_and_token, base=FlaskSingletonTask)
    held_by_another(task, "anvil")

    assert task("anvil") == ("shop", 0)


def test_only_the_body_is_in_the_flask_context(app):
    told = {}

    def tell(place):
        told[place] = bool(current_app)

    class FlaskSingletonTask(SingletonTask, FlaskTask):
        def before_start(self, *args):
            tell("hook")
            super().before_start(*args)

    def sku_alone(sku):
        tell("lock_args")
        return sku

    def skip(conflict):
        tell("on_conflict")
        return "skip"

    def body(self, sku):
        tell("body")

    options = {"lock_args": sku_alone, "on_conflict": skip}
    task = new_task(app, body, base=FlaskSingletonTask, **options)
    task.delay("anvil").get()
    held_by_another(task, "anvil")
    with pytest.raises(DuplicateTaskError):
        task.delay("anvil").get()

    assert told == {"hook": False, "lock_args": False, "on_conflict": False, "body": True}


# base= and the app's task_cls -----------------------------------------------------------------


def test_a_base_takes_the_place_of_the_apps_task_class_and_that_is_warned_of():
    app = new_app(task_cls=FlaskTask)

    task = new_task(app, context_and_token, base=SingletonTask)

    with pytest.warns(UserWarning, match=r"class SingletonTask .*FlaskTask.*Both\(Singleton"):
        context, token = task.delay("anvil").get()
    assert context is None
    assert token > 0


def test_a_class_based_task_is_warned_of_by_its_own_name():
    app = new_app(task_cls=FlaskTask)

    class Buy(SingletonTask):
        name = "shop.buy"

        def run(self):
            """The body."""

    with pytest.warns(UserWarning, match=r"class .*Buy do nothing .* class Both\(Buy, FlaskTask\)"):
        app.register_task(Buy())


def test_many_tasks_of_one_class_are_warned_of_with_one_text():
    app = new_app(task_cls=FlaskTask)

    tasks = [
        new_task(app, context_and_token, base=SingletonTask, name=name)
        for name in ("shop.one", "shop.two")
    ]

    with pytest.warns(UserWarning, match="task_cls") as warned:
        app.finalize()

    assert len(tasks) <= len(warned)
    assert len({str(each.message) for each in warned}) == 1


def test_a_base_that_adds_ours_to_the_apps_own_task_class_does_both():
    app = new_app(task_cls=FlaskTask)

    class FlaskSingletonTask(SingletonTask, app.Task):
        pass

    context, token = new_task(app, context_and_token, base=FlaskSingletonTask).delay("anvil").get()

    assert context == "shop"
    assert token > 0


def test_where_ours_is_the_apps_task_class_each_of_its_tasks_has_a_lock():
    app = new_app(task_cls=SingletonTask)

    _, token = new_task(app, context_and_token).delay("anvil").get()

    assert token > 0


def test_but_for_those_with_another_base():
    app = new_app(task_cls=SingletonTask)

    def body(self):
        return isinstance(self, SingletonTask)

    assert not new_task(app, body, base=Task).delay().get()


# Django ---------------------------------------------------------------------------------------


@pytest.fixture
def django_project(monkeypatch):
    """The environment of a Django project: Celery looks there whether it is in one."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", django_settings.__name__)
    monkeypatch.setattr(sys, "path", [*sys.path])  # Celery puts the current folder in front
    django.setup()
    yield
    connection.close()


@pytest.fixture
def published(app, monkeypatch):
    """What an app that is not eager has published: names and arguments."""
    app.conf.task_always_eager = False
    published = []
    monkeypatch.setattr(app, "send_task", lambda *args, **_: published.append(args[:3]))
    return published


def buy(order_id, sku=None):
    return current_task.lease.fencing_token


def new_django_task(app, **options):
    return new_task(app, buy, bind=False, base=DjangoSingletonTask, **options)


def publish_on_commit(task, how, *args):
    if how == "delay":
        return task.delay_on_commit(*args)
    return task.apply_async_on_commit(args, countdown=1)


@pytest.mark.parametrize("how", ["delay", "apply_async"])
def test_what_is_published_on_commit_is_published_when_the_transaction_commits(
    django_project, app, published, how
):
    task = new_django_task(app)

    with transaction.atomic():
        publish_on_commit(task, how, 1, "anvil")
        assert published == []

    ((name, args, _),) = published
    assert (name, tuple(args)) == ("shop.task", (1, "anvil"))


@pytest.mark.parametrize("how", ["delay", "apply_async"])
def test_what_has_no_key_fails_where_the_caller_is_and_not_at_the_commit(
    django_project, app, published, how
):
    task = new_django_task(app)

    with transaction.atomic():
        with pytest.raises(KeyDerivationError, match="argument 'sku'"):
            publish_on_commit(task, how, 1, object())
        assert connection.run_on_commit == []

    assert published == []


@pytest.mark.parametrize("how", ["delay", "apply_async"])
def test_what_is_rolled_back_is_not_published(django_project, app, published, how):
    task = new_django_task(app)

    with transaction.atomic():
        publish_on_commit(task, how, 1, "anvil")
        transaction.set_rollback(True)

    assert published == []


def test_the_arguments_of_apply_async_on_commit_may_be_named(django_project, app, published):
    task = new_django_task(app)

    with transaction.atomic():
        task.apply_async_on_commit(kwargs={"order_id": 1, "sku": "anvil"})
        with pytest.raises(KeyDerivationError):
            task.apply_async_on_commit(args=(1,), kwargs={"sku": object()})

    assert [kwargs for _, _, kwargs in published] == [{"order_id": 1, "sku": "anvil"}]


def test_a_django_task_locks_like_any_other(django_project, app):
    task = new_django_task(app)

    assert task.delay(1).get() > 0
    held_by_another(task, 1)
    with pytest.raises(DuplicateTaskError):
        task.delay(1).get()


def test_in_a_django_project_our_base_has_to_be_the_one_for_django(django_project):
    # Given Celery's own choice there
    app = new_app()
    assert issubclass(app.Task, DjangoTask)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = new_task(app, buy, bind=False, base=SingletonTask, name="shop.without")
        within = new_task(app, buy, bind=False, base=DjangoSingletonTask, name="shop.within")

    assert not hasattr(without, "delay_on_commit")
    assert hasattr(within, "delay_on_commit")


@pytest.mark.parametrize(
    "task_cls", [DjangoSingletonTask, "celery_singleton_lock.django:DjangoSingletonTask"]
)
def test_celery_leaves_the_task_class_of_an_app_in_a_django_project(django_project, task_cls):
    app = new_app(task_cls=task_cls)

    task = new_task(app, buy, bind=False)

    assert isinstance(task, DjangoSingletonTask)
    assert task.delay(1).get() > 0


def test_the_package_itself_needs_no_django():
    program = "import sys; sys.modules['django'] = None; import celery_singleton_lock"

    subprocess.run([sys.executable, "-c", program], check=True)


# Pydantic -------------------------------------------------------------------------------------


@pytest.fixture
def order_task(app):
    if celery.VERSION < (5, 5):
        pytest.skip("Celery has pydantic tasks from 5.5 on")
    return new_task(app, place_order, base=SingletonTask, pydantic=True)


def test_a_pydantic_task_gets_its_model_and_has_the_lock_of_the_data(order_task):
    data = Order(sku="anvil").model_dump(mode="json")

    assert order_task.delay(data).get() == "anvil"
    held_by_another(order_task, data)
    with pytest.raises(DuplicateTaskError):
        order_task.delay(data).get()
    assert order_task.delay({**data, "quantity": 2}).get() == "anvil"


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery sends models from 5.7 on")
def test_a_model_and_its_data_are_one_call(order_task):
    assert order_task.delay(Order(sku="anvil")).get() == "anvil"
    held_by_another(order_task, Order(sku="anvil").model_dump(mode="json"))
    with pytest.raises(DuplicateTaskError):
        order_task.delay(Order(sku="anvil")).get()


@pytest.mark.parametrize(
    "call",
    [
        lambda task, order: task.apply_async((order,), serializer="pickle"),
        lambda task, order: task.apply((order,)).get(),
    ],
    ids=["with pickle", "with apply"],
)
def test_a_model_that_is_not_sent_as_data_has_no_key(order_task, call):
    with pytest.raises(KeyDerivationError, match="argument 'order'"):
        call(order_task, Order(sku="anvil"))


# task_annotations -----------------------------------------------------------------------------


def buy_some(order_id, sku):
    """Two parameters."""


def test_annotations_set_lock_options_for_one_task_and_for_all(app):
    app.conf.task_annotations = {
        "*": {"on_conflict": "requeue"},
        "shop.one": {"lock_args": "sku", "lock_ttl": 9},
    }

    one, other = (
        new_task(app, buy_some, bind=False, base=SingletonTask, name=name, lock_ttl=5)
        for name in ("shop.one", "shop.other")
    )

    assert (one.lock_args, one.lock_ttl, one.on_conflict) == (("sku",), 9.0, "requeue")
    assert (other.lock_args, other.lock_ttl, other.on_conflict) == (None, 5.0, "requeue")


def test_an_annotation_for_all_wins_over_one_by_name_which_wins_over_the_task(app):
    app.conf.task_annotations = {
        "*": {"lock_ttl": 1},
        "shop.task": {"lock_ttl": 2, "wait_timeout": 2},
    }

    task = new_task(app, buy_some, bind=False, base=SingletonTask, lock_ttl=3, wait_timeout=3)

    assert (task.lock_ttl, task.wait_timeout) == (1.0, 2.0)


def test_an_annotation_for_all_goes_past_tasks_without_a_lock(app):
    app.conf.task_annotations = {"*": {"lock_ttl": 7}}

    plain = new_task(app, buy_some, bind=False)

    assert plain.delay(1, "anvil").get() is None
    app.finalize()  # Celery's own tasks too


def test_an_annotation_that_is_misspelt_is_named_with_the_right_ones(app):
    app.conf.task_annotations = {"*": {"lock_tll": 7}}

    with pytest.raises(ConfigurationError, match=r"no option lock_tll\. Did you mean lock_ttl"):
        new_task(app, buy_some, bind=False, base=SingletonTask).delay(1, "anvil")


def test_an_annotation_may_be_a_callable_as_the_option_may(app):
    app.conf.task_annotations = {
        "shop.task": {"lock_args": lambda order_id, sku: sku, "on_conflict": lambda _: "fail"}
    }
    task = new_task(app, buy_some, bind=False, base=SingletonTask)
    held_by_another(task, 1, "anvil")

    with pytest.raises(LockHeldError):
        task.delay(2, "anvil").get()


# Hooks, retries, bind -------------------------------------------------------------------------


class NotingTask(Task):
    """Notes in which of its methods the run has its lock."""

    noted = None  # a list, in its subclasses

    def before_start(self, *args):
        self._note("before_start")
        super().before_start(*args)

    def __call__(self, *args, **kwargs):
        self._note("__call__")
        return super().__call__(*args, **kwargs)

    def on_success(self, *args):
        self._note("on_success")
        super().on_success(*args)

    def on_failure(self, *args):
        self._note("on_failure")
        super().on_failure(*args)

    def after_return(self, *args):
        self._note("after_return")
        super().after_return(*args)

    def _note(self, hook):
        self.noted.append(hook + (" with lock" if self.lease.fencing_token else ""))


@pytest.mark.parametrize("is_ours_first", [True, False])
@pytest.mark.parametrize(("outcome", "hook"), [("return", "on_success"), ("raise", "on_failure")])
def test_the_methods_of_other_bases_are_called_once_in_both_orders(
    app, is_ours_first, outcome, hook
):
    bases = (SingletonTask, NotingTask) if is_ours_first else (NotingTask, SingletonTask)
    noting = type("Both", bases, {"noted": []})

    def body(self):
        if outcome == "raise":
            raise KeyError

    new_task(app, body, base=noting).delay()

    assert noting.noted == [
        "before_start",
        "__call__ with lock",
        f"{hook} with lock",
        "after_return with lock",
    ]


def test_autoretry_for_leaves_a_run_alone_that_was_refused(app):
    def body(self):
        raise AssertionError("must not run")

    task = new_task(app, body, base=SingletonTask, on_conflict="fail", autoretry_for=(Exception,))
    held_by_another(task)

    result = task.delay()

    assert result.state == "FAILURE"
    assert isinstance(result.result, LockHeldError)


def test_autoretry_for_runs_a_body_again_with_a_lease_of_its_own(app):
    tokens = []

    def body(self):
        tokens.append(self.lease.fencing_token)
        if len(tokens) < 3:
            raise KeyError

    new_task(
        app, body, base=SingletonTask, autoretry_for=(KeyError,), default_retry_delay=0
    ).delay()

    assert tokens == sorted(set(tokens))
    assert len(tokens) == 3


def test_a_body_has_the_same_key_and_a_lease_whether_it_is_bound_or_not(app):
    def bound(self, order_id, sku=None):
        return self.lease.fencing_token

    first = new_task(app, bound, base=SingletonTask, name="shop.bound", lock_name="shop.buy")
    second = new_task(app, buy, bind=False, base=SingletonTask, lock_name="shop.buy")

    keys = {
        each._lock_options.key("", args, kwargs)
        for each in (first, second)
        for args, kwargs in [((1,), {}), ((1, None), {}), ((), {"order_id": 1})]
    }
    assert len(keys) == 1
    assert first.delay(1).get() > 0
    assert second.delay(1).get() > 0


def test_a_shared_task_locks_in_each_app_as_that_app_says(shared_tasks_of_this_test):
    @shared_task(base=SingletonTask, bind=True, name="shop.shared", on_conflict="fail")
    def shared(self):
        return self.lease.fencing_token

    one, other = new_app(), new_app()
    other.conf.singleton_lock_ttl = 9

    one_task, other_task = (each.tasks["shop.shared"] for each in (one, other))
    assert (one_task.lock_ttl, other_task.lock_ttl) == (30.0, 9.0)
    assert one_task.delay().get() > 0
    held_by_another(other_task)
    with pytest.raises(LockHeldError):
        other_task.delay().get()


# Direct calls ---------------------------------------------------------------------------------


def test_apply_runs_a_body_here_and_takes_its_lock(app):
    task = new_task(app, context_and_token, base=SingletonTask)

    assert task.apply(("anvil",)).get()[1] > 0
    held_by_another(task, "anvil")
    with pytest.raises(DuplicateTaskError):
        task.apply(("anvil",)).get()


def test_a_direct_call_may_have_its_lock_taken_by_hand(app):
    task = new_task(app, context_and_token, base=SingletonTask)

    with task.lock("anvil") as lease:
        assert task.holder("anvil").fencing_token == lease.fencing_token
        assert task("anvil") == (None, 0)

    assert task.holder("anvil") is None


@pytest.mark.parametrize("how", ["call", "run"])
def test_neither_a_call_nor_its_run_takes_the_lock(app, how):
    task = new_task(app, context_and_token, base=SingletonTask)
    held_by_another(task, "anvil")

    assert (task("anvil") if how == "call" else task.run("anvil")) == (None, 0)


def test_a_call_in_the_body_of_the_same_task_is_a_part_of_that_run(app):
    def body(self, sku, is_nested=False):
        token = self.lease.fencing_token
        return [token] if is_nested else [token, *self("hammer", is_nested=True)]

    task = new_task(app, body, base=SingletonTask)
    held_by_another(task, "hammer", True)

    tokens = task.delay("anvil").get()

    assert len(tokens) == 2
    assert len(set(tokens)) == 1
