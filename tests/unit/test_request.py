"""Which request class a task gets that asks for one itself."""

from __future__ import annotations

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
