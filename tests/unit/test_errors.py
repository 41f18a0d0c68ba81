"""Errors travel: through a result backend and back, with what they carry."""

from __future__ import annotations

import pickle

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from celery_singleton_lock import DuplicateTaskError, Holder, LockHeldError, SingletonError

HOLDER = Holder("4711", "celery@there", 7, 1_700_000_000.5, 1_700_000_000_500_000)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("kind", [LockHeldError, DuplicateTaskError])
def test_an_error_comes_back_from_the_result_backend_with_its_holder(kind, serializer):
    app = Celery("errors", set_as_current=False, backend="cache+memory://")
    app.conf.update(result_serializer=serializer, accept_content=[serializer])
    backend = app.backend
    backend.serializer = serializer

    stored = backend.decode(backend.encode(backend.prepare_exception(kind("it was held", HOLDER))))
    error = backend.exception_to_python(stored)

    assert type(error) is kind
    assert error.holder == HOLDER
    assert str(error) == "it was held"


def test_a_skipped_run_is_handled_by_who_handles_held_locks_and_by_who_handles_revoked_tasks():
    assert issubclass(DuplicateTaskError, (LockHeldError,))
    assert issubclass(DuplicateTaskError, TaskRevokedError)
    assert issubclass(DuplicateTaskError, SingletonError)


def test_errors_survive_pickle_as_prefork_pools_need_it():
    error = pickle.loads(pickle.dumps(DuplicateTaskError("it was held", HOLDER)))

    assert error.holder == HOLDER


def test_a_holder_reads_as_a_sentence():
    assert str(HOLDER) == "task 4711 on celery@there (pid 7) since 2023-11-14 22:13:20+00:00"
