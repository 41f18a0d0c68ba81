"""What a worker says when it starts: what is legal, and will bite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from celery import Celery, Task

from celery_singleton_lock import SingletonTask
from celery_singleton_lock.advice import on_tasks


@pytest.fixture
def app():
    return Celery("advice", set_as_current=False, broker="redis://localhost:1", changes={})


def said(app, has_child_processes=True, time_limit=None, soft_time_limit=None):
    worker = SimpleNamespace(app=app, time_limit=time_limit, soft_time_limit=soft_time_limit)
    return list(on_tasks(worker, has_child_processes))


def add(app, name, base=SingletonTask, **options):
    app.task(base=base, shared=False, name=name, **options)(body)


def body():
    """Does nothing."""


@pytest.mark.parametrize("limit", ["time_limit", "soft_time_limit"])
def test_tasks_that_nothing_ends_are_named(app, limit):
    for name in ("shop.a", "shop.b", "shop.c", "shop.d", "shop.e"):
        add(app, name)
    add(app, "shop.ended", **{limit: 60})
    add(app, "shop.plain", base=Task)

    (line,) = said(app)

    assert "No time limit ends shop.a, shop.b, shop.c, 2 more:" in line
    assert "task_time_limit" in line


@pytest.mark.parametrize("limit", ["time_limit", "soft_time_limit"])
def test_the_workers_time_limit_is_one_for_all_its_tasks(app, limit):
    add(app, "shop.a")

    assert said(app, **{limit: 60}) == []


def test_the_workers_time_limit_is_that_of_tasks_that_have_none(app):
    add(app, "shop.a", acks_late=True)
    add(app, "shop.b", acks_late=True, time_limit=60)

    (line,) = said(app, time_limit=3601)

    assert "time limit of shop.a: " in line


def test_a_time_limit_is_not_asked_for_where_the_pool_knows_none(app):
    add(app, "shop.a")

    assert said(app, has_child_processes=False) == []


@pytest.mark.parametrize(
    ("options", "transport_options", "is_short"),
    [
        ({"time_limit": 3601, "acks_late": True}, {}, True),
        ({"time_limit": 3600, "acks_late": True}, {}, False),
        ({"time_limit": 3601, "acks_late": False}, {}, False),
        ({"time_limit": 3601, "acks_late": True}, {"visibility_timeout": 4000}, False),
        ({"time_limit": 60, "acks_late": True}, {"visibility_timeout": 30}, True),
        ({"time_limit": 60, "default_retry_delay": 100}, {"visibility_timeout": 30}, True),
    ],
)
def test_a_visibility_timeout_that_is_too_short_is_told(app, options, transport_options, is_short):
    options = {"default_retry_delay": 1, **options}
    add(app, "shop.a", **options)
    app.conf.broker_transport_options = transport_options

    lines = said(app)

    assert len(lines) == is_short
    assert all("visibility_timeout" in line and "shop.a" in line for line in lines)


def test_a_broker_that_knows_no_visibility_timeout_has_none_that_is_too_short(app):
    app.conf.broker_url = "amqp://localhost:1"
    add(app, "shop.a", time_limit=9999, acks_late=True)

    assert said(app) == []
