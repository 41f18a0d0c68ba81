"""What a task says about its lock, and how it is told that it said it wrong."""

from __future__ import annotations

import sys
from datetime import timedelta

import pytest
from celery import Celery, shared_task
from celery.app.task import Task

from celery_singleton_lock import (
    ConfigurationError,
    KeyDerivationError,
    LockHeldError,
    SingletonTask,
)


@pytest.fixture
def app():
    return Celery("options", set_as_current=False, broker="memory://")


def bound(app, function=None, **options):
    """The task, as Celery binds it."""
    if function is None:

        def function(order_id, sku, quantity=1):
            """Three parameters."""

    # Not shared, which would bind the tasks of one test to the apps of all later ones.
    options = {"base": SingletonTask, "name": "shop.buy", "shared": False, **options}
    task = app.task(**options)(function)
    app.finalize()
    return task


def test_the_defaults_are_visible_on_the_task(app):
    task = bound(app)

    assert task.lock_name == "shop.buy"
    assert task.lock_args is None
    assert task.lock_ttl == 30.0
    assert task.on_conflict == "skip"
    assert task.wait_timeout is None
    assert task.lock_at_least_for == 0.0
    assert task.lock_on_retry == "release"


@pytest.mark.parametrize("value", ["false", 0])
def test_a_switch_that_is_neither_on_nor_off_is_an_error(app, value):
    app.conf.singleton_enabled = value

    with pytest.raises(ConfigurationError, match=r"singleton_enabled must be True or False"):
        bound(app)


def test_the_apps_settings_are_the_tasks_defaults(app):
    app.conf.update(
        singleton_lock_ttl=5,
        singleton_on_conflict="fail",
        singleton_wait_timeout=timedelta(minutes=1),
    )
    task = bound(app)

    assert (task.lock_ttl, task.on_conflict, task.wait_timeout) == (5.0, "fail", 60.0)


def test_the_task_wins_over_the_app_and_annotations_over_the_task(app):
    app.conf.update(singleton_lock_ttl=5, task_annotations={"shop.buy": {"wait_timeout": 7}})
    task = bound(app, lock_ttl=timedelta(seconds=9), wait_timeout=1)

    assert (task.lock_ttl, task.wait_timeout) == (9.0, 7.0)


def test_settings_may_come_from_django_with_a_namespace():
    class Settings:
        CELERY_SINGLETON_LOCK_TTL = 5
        CELERY_BROKER_URL = "memory://"
        SINGLETON_OF_SOMEBODY_ELSE = True

    app = Celery("django", set_as_current=False)
    app.config_from_object(Settings, namespace="CELERY")

    assert bound(app).lock_ttl == 5.0


def test_a_callable_is_given_the_calls_arguments_and_nothing_else(app):
    def buy(self, order_id, sku):
        """A body that is a method."""

    seen = []
    task = bound(
        app,
        buy,
        bind=True,
        lock_args=lambda *args, **kwargs: seen.append((args, kwargs)) or "x",
        on_conflict=lambda conflict: "skip",
    )

    task._lock_options.key("", (1,), {"sku": "anvil"})

    assert seen == [((1, "anvil"), {})]
    assert task.lock_args("anything") == "x"
    assert task.on_conflict("anything") == "skip"


def test_a_class_based_task_has_its_options_as_attributes(app):
    class Buy(SingletonTask):
        name = "shop.class_based"
        lock_args = "sku"
        on_conflict = "requeue"

        def run(self, order_id, sku):
            """The body."""

    task = app.register_task(Buy())

    assert task.lock_args == ("sku",)
    assert task._lock_options.key("", (1, "a"), {}) == task._lock_options.key("", (2, "a"), {})


def test_shared_tasks_are_bound_to_each_app(shared_tasks_of_this_test, app):
    @shared_task(base=SingletonTask, name="shop.shared")
    def shared():
        """A task of no app in particular."""

    app.finalize()

    assert app.tasks["shop.shared"].lock_name == "shop.shared"


def test_a_class_based_task_without_a_name_has_the_one_that_celery_gives_it(app):
    class One(SingletonTask):
        def run(self, sku):
            """The body."""

    class Other(SingletonTask):
        def run(self, sku):
            """Another one, with the same argument."""

    one, other = app.register_task(One()), app.register_task(Other())

    assert one.lock_name == one.name == f"{__name__}.One"
    assert other.lock_name == other.name
    assert one._lock_options.key("", ("a",), {}) != other._lock_options.key("", ("a",), {})


def test_tasks_of_one_class_that_name_themselves_have_locks_of_their_own(app):
    class Fetch(SingletonTask):
        def __init__(self, name):
            self.name = name

        def run(self, sku):
            """The body."""

    class FetchInTurn(Fetch):
        lock_name = "fetch"

    def keys(task_class, *names):
        tasks = [app.register_task(task_class(name)) for name in names]
        return {task._lock_options.key("", ("a",), {}) for task in tasks}

    assert len(keys(Fetch, "shop.one", "shop.other")) == 2
    assert len(keys(FetchInTurn, "shop.third", "shop.fourth")) == 1


@pytest.mark.parametrize("is_bound_itself", [False, True])
def test_celerys_own_tasks_take_no_lock_where_ours_is_the_apps_task_class(is_bound_itself):
    app = Celery("all", set_as_current=False, task_cls=SingletonTask, broker="memory://")
    if is_bound_itself:
        assert app.Task.app is app  # to ask is enough
    app.finalize()

    assert isinstance(app.tasks["celery.chord_unlock"], SingletonTask)
    for name in (each for each in app.tasks if each.startswith("celery.")):
        assert app.tasks[name]._lock_options is None, name


# Who leaves arguments out must say what becomes of duplicates ---------------------------------


@pytest.mark.parametrize("lock_args", ["sku", ("order_id", "sku"), (), lambda *args: 1])
def test_a_lock_that_leaves_arguments_out_needs_on_conflict_said(app, lock_args):
    with pytest.raises(ConfigurationError, match=r"leaves out .*on_conflict"):
        bound(app, lock_args=lock_args)


def test_saying_it_on_the_task_or_the_app_is_enough(app):
    assert bound(app, lock_args="sku", on_conflict="skip").on_conflict == "skip"


def test_saying_it_for_the_whole_app_is_enough(app):
    app.conf.singleton_on_conflict = "requeue"

    assert bound(app, lock_args="sku").on_conflict == "requeue"


def test_naming_every_argument_leaves_nothing_out(app):
    assert bound(app, lock_args=("quantity", "sku", "order_id")).on_conflict == "skip"


# Who inherits from a task that is bound, and who is bound twice --------------------------------


def test_a_subclass_of_a_bound_task_has_a_lock_of_its_own(app):
    class Parent(SingletonTask):
        name = "shop.parent"
        lock_ttl = 7

        def run(self, order_id, sku):
            """The body."""

    class Child(Parent):
        name = "shop.child"

    parent, child = app.register_task(Parent()), app.register_task(Child())

    assert (parent.lock_name, child.lock_name) == ("shop.parent", "shop.child")
    assert child.lock_ttl == 7.0, "what the parent said itself is inherited"


def test_a_subclass_of_a_bound_task_has_to_say_on_conflict_itself(app):
    class Parent(SingletonTask):
        name = "shop.parent"

        def run(self, order_id, sku):
            """The body."""

    app.register_task(Parent())

    class Child(Parent):
        name = "shop.child"
        lock_args = "sku"

    with pytest.raises(ConfigurationError, match="leaves out order_id"):
        app.register_task(Child())


def test_a_class_that_is_bound_to_two_apps_reads_each_ones_settings(app):
    class Buy(SingletonTask):
        name = "shop.twice"

        def run(self):
            """The body."""

    app.conf.singleton_lock_ttl = 11
    other = Celery("other", set_as_current=False, broker="memory://")
    other.conf.singleton_lock_ttl = 22

    Buy.bind(app)
    assert Buy.lock_ttl == 11.0
    Buy.bind(other)
    assert Buy.lock_ttl == 22.0
    assert Buy.throws.count(LockHeldError) == 1


def test_throws_may_be_one_class_as_celery_takes_it(app):
    assert bound(app, throws=KeyError).throws == (KeyError, LockHeldError)


def test_a_body_that_mutates_its_default_does_not_change_its_key(app):
    def collect(item, seen=[]):  # noqa: B006  # the mistake is the point
        seen.append(item)

    task = bound(app, collect)
    before = task._lock_options.key("", (1,), {})
    task.run(1)

    assert task._lock_options.key("", (1,), {}) == before
    assert task._lock_options.key("", (1, []), {}) == before


def test_a_default_that_cannot_be_sent_has_a_place_in_the_key(app):
    missing = object()

    def buy(sku, coupon=missing):
        """A sentinel is a common default."""

    task = bound(app, buy)

    assert task._lock_options.key("", ("a",), {}) == task._lock_options.key("", (), {"sku": "a"})
    assert task._lock_options.key("", ("a",), {}) != task._lock_options.key("", ("a", None), {})


def test_a_sentinel_default_reaches_a_lock_args_callable_as_itself(app):
    missing = object()

    def buy(sku, coupon=missing):
        """A sentinel is a common default."""

    task = bound(
        app,
        buy,
        lock_args=lambda sku, coupon: (sku, "none" if coupon is missing else coupon),
        on_conflict="skip",
    )

    assert task._lock_options.key("", ("a",), {}) == task._lock_options.key("", ("a", "none"), {})


def test_a_users_task_may_be_named_as_celerys_own_are():
    app = Celery("celery", set_as_current=False, broker="memory://")

    assert bound(app, name="celery.add")._lock_options is not None


# Overridden hooks ------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["before_start", "on_bound", "retry"])
def test_a_hook_that_forgets_super_is_found_out_when_its_class_is_made(hook):
    def forgetful(self, *args, **kwargs):
        """Does something else."""

    with pytest.warns(UserWarning, match=rf"Forgetful\.{hook}\(\) .* write super\(\)\.{hook}"):
        type("Forgetful", (SingletonTask,), {hook: forgetful})


def test_a_hook_that_is_given_as_a_task_option_is_found_out_too(app):
    with pytest.warns(UserWarning, match="its runs take no lock"):
        bound(app, before_start=lambda self, task_id, args, kwargs: None)


def test_a_base_in_front_of_ours_whose_hook_forgets_super_is_found_out_once():
    class Other(Task):
        def before_start(self, *args):
            """Does something else."""

    with pytest.warns(UserWarning, match=r"Other\.before_start\(\), a base of .*Mixed, does not"):

        class Mixed(Other, SingletonTask):
            pass

    class Child(Mixed):
        """Its parent was warned of."""

    class Behind(SingletonTask, Other):
        """Here ours comes first."""

    assert issubclass(Child, Behind.__mro__[1])


def test_hooks_that_call_the_next_one_are_fine():
    class Fine(SingletonTask):
        def before_start(self, *args):
            super().before_start(*args)

        def after_return(self, *args):
            """Need not: under it is a net."""

        def retry(self, *args, **kwargs):
            return SingletonTask.retry(self, *args, **kwargs)

    assert Fine is not None


# Wrong values and misspelt names --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lock_ttl": 0}, r"lock_ttl of task shop\.buy must be a number of seconds above 0"),
        ({"lock_ttl": "30"}, "lock_ttl"),
        ({"lock_ttl": 1e11}, "lock_ttl of task shop.buy must not be longer than a year"),
        ({"lock_args": {"sku", "order_id"}}, "lock_args"),
        ({"lock_args": (name for name in ["sku"])}, "lock_args"),
        ({"on_conflict": lambda self, conflict: "skip"}, "on_conflict .* drop 'self'"),
        ({"lock_ttl": True}, "lock_ttl"),
        ({"lock_ttl": float("nan")}, "lock_ttl"),
        ({"lock_at_least_for": -1}, "lock_at_least_for of task shop.buy must be .* from 0 on"),
        (
            {"on_lease_lost": "stop"},
            "on_lease_lost of task shop.buy must be 'warn' or 'abort', not 'stop'",
        ),
        ({"lock_on_retry": "keep"}, "lock_on_retry of task shop.buy must be 'release' or 'hold'"),
        ({"wait_timeout": -1}, r"wait_timeout of task shop\.buy"),
        ({"on_conflict": "skipp"}, "on_conflict of task shop.buy .*Did you mean skip"),
        ({"on_conflict": 3}, "on_conflict"),
        ({"lock_name": ""}, "lock_name"),
        ({"lock_name": 5}, "lock_name"),
        ({"lock_args": "skuu"}, "lock_args of task shop.buy names 'skuu', but the task takes"),
        ({"lock_args": 5}, "lock_args"),
        ({"lock_args": [1]}, "lock_args"),
        ({"lock_args": lambda self, sku: sku, "on_conflict": "skip"}, "drop 'self'"),
        ({"lock_tll": 5}, "no option lock_tll. Did you mean lock_ttl"),
        ({"lock_timeout": 5}, "no option lock_timeout"),
        ({"on_confict": "skip"}, "no option on_confict. Did you mean on_conflict"),
        ({"wait_timout": 3}, "no option wait_timout. Did you mean wait_timeout"),
    ],
)
def test_a_wrong_task_option_is_named_with_the_right_ones(app, options, message):
    with pytest.raises(ConfigurationError, match=message):
        bound(app, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"singleton_lock_ttl": "soon"}, "The setting singleton_lock_ttl must be a number"),
        ({"singleton_on_conflict": "wiat"}, "The setting singleton_on_conflict must be one of"),
        ({"singleton_lock_tll": 5}, "no setting singleton_lock_tll. Did you mean"),
        ({"singleton_redis_url": "x"}, "no setting singleton_redis_url"),
    ],
)
def test_a_wrong_setting_is_named_with_the_right_ones(app, settings, message):
    app.conf.update(settings)

    with pytest.raises(ConfigurationError, match=message):
        bound(app)


def test_a_users_own_attributes_are_their_own(app):
    task = bound(app, locksmith=1, on_success_url="x", timeout=3)

    assert task.locksmith == 1


# Publishing -----------------------------------------------------------------------------------


def test_what_has_no_key_fails_where_the_caller_is(app, monkeypatch):
    task = bound(app)
    published = []
    monkeypatch.setattr(app, "send_task", lambda *args, **kwargs: published.append(args))

    with pytest.raises(KeyDerivationError, match=r"shop\.buy: argument 'sku'"):
        task.delay(1, object())
    with pytest.raises(KeyDerivationError):
        task.s(1, object()).apply_async()

    assert published == []
    task.delay(1, "anvil")
    assert len(published) == 1


def test_arguments_that_do_not_fit_are_celerys_own_error(app):
    with pytest.raises(TypeError, match="missing"):
        bound(app).delay()


def test_importing_the_package_imports_no_store_client_and_starts_nothing():
    import subprocess

    program = (
        "import celery_singleton_lock, sys, threading;"
        "assert 'celery_singleton_lock.stores.redis' not in sys.modules;"
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_lease_of_a_task_that_does_not_run_is_the_null_lease(app):
    task = bound(app)

    task.lease.check()
    assert task.lease.fencing_token == 0
    assert isinstance(task, Task)
