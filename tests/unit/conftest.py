from __future__ import annotations

from weakref import WeakSet

import pytest
from celery import _state

from absent_store import AbsentStore
from celery_singleton_lock.lease import Lease
from celery_singleton_lock.stores.base import Claimant
from fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> AbsentStore:
    return AbsentStore(clock=clock)


@pytest.fixture
def new_lease(store: AbsentStore, clock: FakeClock):
    """Makes leases on one store, as two runs would."""

    def make(key: str = "report", task_id: str = "first", ttl: float = 30.0) -> Lease:
        return Lease(store, key, ttl, Claimant(task_id, "celery@here", 1), clock=clock)

    return make


@pytest.fixture
def shared_tasks_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tasks are bound to all apps, also to those of other tests: here, to none of them."""
    monkeypatch.setattr(_state, "_apps", WeakSet())
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))
