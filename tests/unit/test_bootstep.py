"""What a worker tells the runs that wait in its slots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from celery import Celery
from celery.worker import state as worker_state

from celery_singleton_lock.bootstep import StoreCheck
from celery_singleton_lock.locks import AppLocks


@pytest.mark.parametrize("kind", ["stop", "terminate"])
def test_runs_that_wait_are_told_of_each_kind_of_shutdown(kind):
    app = Celery("shop", set_as_current=False)
    app.conf.task_always_eager = True
    worker = SimpleNamespace(app=app)
    assert not AppLocks.of(app).is_stopping()

    getattr(StoreCheck(worker), kind)(worker)

    assert AppLocks.of(app).is_stopping()


@pytest.mark.parametrize("exit_code", [0, 1])
def test_runs_that_wait_in_the_workers_own_process_are_told_of_its_signal(monkeypatch, exit_code):
    app = Celery("shop", set_as_current=False)
    app.conf.task_always_eager = True

    monkeypatch.setattr(worker_state, "should_stop", exit_code)

    assert AppLocks.of(app).is_stopping()


def test_a_worker_of_an_app_whose_locks_are_switched_off_checks_nothing_and_says_so(caplog):
    app = Celery("shop", set_as_current=False, changes={"singleton_enabled": False})

    assert not StoreCheck(SimpleNamespace(app=app)).include_if(SimpleNamespace(app=app))

    assert "singleton_enabled is False" in caplog.text
