"""An app whose task class is SingletonTask, with tasks made in every other way there is.

Run by workers, never imported by the tests: its shared task, and Django's settings, would be
there for all of them. Nor are annotations strings here: Celery 5.5 reads no such ones.
"""

import json
import os
import time

from celery import Celery, Task, current_task, shared_task
from celery.worker.request import Request
from django.db import transaction
from flask import Flask, current_app

from celery_singleton_lock import SingletonTask
from celery_singleton_lock.django import DjangoSingletonTask
from orders import Order
from worker_app import ENVIRONMENT_VARIABLE, _recorded, _wait_at_gate

os.environ["DJANGO_SETTINGS_MODULE"] = "django_settings"  # as the manage.py of a project does


class MixingApp(Celery):
    """Names its tasks so that their locks are among ``worker_app.LOCK_KEYS``."""

    def gen_task_name(self, name, module):
        return f"worker_app.{name}"


app = MixingApp("mixing_app", task_cls=SingletonTask)
app.conf.update(json.loads(os.environ[ENVIRONMENT_VARIABLE]))


def _hold(task, label):
    with _recorded(task, label):
        _wait_at_gate(label)
    return label


@app.task(bind=True)
def bound(self, label):
    return _hold(self, label)


@app.task
def unbound(label):
    return _hold(current_task, label)


@shared_task(bind=True)
def shared(self, label):
    return _hold(self, label)


@app.register_task
class ClassBased(SingletonTask):
    def run(self, label):
        return _hold(self, label)


@app.task(bind=True, pydantic=True)
def pydantic(self, order: Order):
    return _hold(self, order.sku)


class FlaskTask(Task):
    """As in Flask's documentation."""

    def __call__(self, *args, **kwargs):
        with Flask("shop").app_context():
            return self.run(*args, **kwargs)


class FlaskLast(SingletonTask, FlaskTask):
    pass


class FlaskFirst(FlaskTask, SingletonTask):
    pass


def _hold_in_context(self, label):
    assert current_app.name == "shop"
    return _hold(self, label)


flask_last = app.task(base=FlaskLast, bind=True, name="worker_app.flask_last")(_hold_in_context)
flask_first = app.task(base=FlaskFirst, bind=True, name="worker_app.flask_first")(_hold_in_context)


class PreparingTask(Task):
    """Prepares its runs, and tidies up after them."""

    def before_start(self, task_id, args, kwargs):
        self.request.is_prepared = True
        super().before_start(task_id, args, kwargs)

    def after_return(self, *args):
        del self.request.is_prepared
        super().after_return(*args)


class PreparingLast(SingletonTask, PreparingTask):
    pass


class PreparingFirst(PreparingTask, SingletonTask):
    pass


def _hold_prepared(self, label):
    assert self.request.is_prepared
    return _hold(self, label)


prepared_last = app.task(base=PreparingLast, bind=True, name="worker_app.prepared_last")(
    _hold_prepared
)
prepared_first = app.task(base=PreparingFirst, bind=True, name="worker_app.prepared_first")(
    _hold_prepared
)


class MarkingRequest(Request):
    """Somebody's own request class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._request_dict["is_marked"] = True


@app.task(bind=True, Request="mixing_app:MarkingRequest")
def own_request(self, label):
    assert self.request.is_marked
    return _hold(self, label)


@app.task(base=DjangoSingletonTask, bind=True)
def django(self, label):
    return _hold(self, label)


@app.task(base=Task)
def publish_on_commit(label):
    """Returns whether Django's transaction was still open when it asked for that."""
    with transaction.atomic():
        django.delay_on_commit(label)
        return transaction.get_connection().in_atomic_block


@app.task(bind=True)
def annotated(self, label, number):
    """What is said of its lock is said by the setting ``task_annotations``."""
    return _hold(self, label)


@app.task(
    bind=True,
    lock_args="label",
    on_conflict="requeue",
    autoretry_for=(KeyError,),
    max_retries=2,
    default_retry_delay=0,
)
def fail_twice(self, label, number):
    with _recorded(self, label):
        time.sleep(0.05)
        if self.request.retries < 2:
            raise KeyError
    return number


@app.task(bind=True, lock_name="worker_app.bound")
def tell_token(self, label):
    """Shares its locks with ``bound``."""
    return self.lease.fencing_token


@app.task(base=Task)
def call_directly(label):
    return tell_token(label)


@app.task(base=Task)
def collect(results):
    """The body of a chord."""
    return results
