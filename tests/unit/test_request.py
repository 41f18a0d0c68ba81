"""Which request class a task gets that asks for one itself, and what ours knows of a dead run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from billiard.exceptions import WorkerLostError
from celery import Task
from celery.worker.request import Request

from celery_singleton_lock import SingletonTask
from celery_singleton_lock.request import SingletonRequest, combined_request


class Counting(Request):
    pass


class CountingAndTiming(Counting):
    pass


class CountsLocks(SingletonRequest):
    pass


class CountingTask(Task):
    Request = Counting


class TimingTask(Task):
    Request = CountingAndTiming


class LockCountingTask(Task):
    Request = CountsLocks


def test_a_task_that_asks_for_nothing_gets_ours():
    assert combined_request(SingletonTask) is SingletonRequest


def test_ours_comes_before_one_that_the_task_asks_for():
    class Both(CountingTask, SingletonTask):
        pass

    assert combined_request(Both).__mro__[1:3] == (SingletonRequest, Counting)


def test_a_request_that_extends_another_base_s_stands_for_both():
    class Mixed(SingletonTask, CountingTask, TimingTask):
        pass

    assert combined_request(Mixed).__bases__ == (SingletonRequest, CountingAndTiming)


def test_a_request_that_extends_ours_stands_for_it_also_from_a_later_base():
    class Mixed(SingletonTask, LockCountingTask):
        pass

    assert combined_request(Mixed) is CountsLocks


def test_one_that_extends_ours_comes_first_as_ours_does():
    class Mixed(CountingTask, LockCountingTask):
        pass

    assert combined_request(Mixed).__bases__ == (CountsLocks, Counting)


@pytest.mark.parametrize(("retries", "max_retries"), [(0, 1), (5, None)])
def test_a_lost_run_that_celery_retries_comes_again(retries, max_retries):
    assert _comes_again(retries, max_retries)


def test_a_lost_run_whose_retries_are_used_up_does_not_come_again():
    assert not _comes_again(1, 1)


def _comes_again(retries, max_retries):
    task = SimpleNamespace(
        retry_on_worker_lost=True,
        max_retries=max_retries,
        acks_late=True,
        reject_on_worker_lost=True,
    )
    request = SimpleNamespace(task=task, _context=SimpleNamespace(retries=retries))
    return SingletonRequest._comes_again(request, WorkerLostError())
