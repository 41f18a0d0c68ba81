"""The examples of celery-singleton's, celery-once's and celery-heimdall's READMEs, ported.

Each test is one example, with what its README promises; docs/migrating.md has the same as text.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import states
from celery.exceptions import TimeLimitExceeded

from celery_singleton_lock import LockHeldError, SingletonTask
from ported_tasks import (
    do_once_in_a_while,
    do_once_per_user,
    do_something,
    do_stuff,
    do_stuff_with_short_ttl,
    example_task,
    fail_to_do_stuff,
    generate_invoice,
    generate_report,
    generate_report_alone,
    generate_report_or_raise,
    generate_report_within,
    generate_statement,
    long_running_task,
    lost_task,
    slow_add,
    slow_add_alone,
    slow_add_by_a,
    slow_task,
    slow_task_graceful,
    unlock_before_run,
    unlock_before_run_by_a,
)
from waiting import wait_until
from worker_app import open_gate


@pytest.fixture
def delay(worker):
    """``task.delay(...)``, to the test's own worker."""

    def delay(task, *args, **kwargs):
        return task.apply_async(args, kwargs, queue=worker.worker_queue)

    return delay


def assert_already_queued(first, delay, *call, **kwargs):
    with pytest.raises(LockHeldError) as caught:
        delay(*call, **kwargs)
    assert caught.value.holder.task_id == first.id


# celery-singleton --------------------------------------------------------------------------------


def test_singleton_quick_start(delay, history, label):
    first = delay(do_stuff, label, 2, 3, a="b")
    second = delay(do_stuff, label, 2, 3, a="b")
    open_gate(label)

    assert first == second
    assert [first.get(timeout=20), second.get(timeout=20)] == ["woke up"] * 2
    assert len(history.runs(label)) == 1


def test_singleton_the_same_while_it_runs_and_others_for_other_arguments(delay, history, new_label):
    one, two = new_label(), new_label()
    a = delay(do_stuff, one, 2, 3)
    history.wait_for_starts(one)
    b = delay(do_stuff, one, 2, 3)
    c = delay(do_stuff, two, 5, 6)

    assert a == b
    assert a != c
    history.wait_for_starts(two)  # beside the first


def test_singleton_another_once_it_has_finished(delay, history, label):
    open_gate(label)
    a = delay(do_stuff, label)
    a.get(timeout=20)

    d = delay(do_stuff, label)

    assert a != d
    assert d.get(timeout=20) == "woke up"
    assert len(history.runs(label)) == 2


def test_singleton_another_once_it_has_failed(delay, label):
    open_gate(label)
    first = delay(fail_to_do_stuff, label)
    with pytest.raises(ArithmeticError):
        first.get(timeout=20)

    second = delay(fail_to_do_stuff, label)

    assert first != second
    with pytest.raises(ArithmeticError):
        second.get(timeout=20)


def test_singleton_deadlocks_end_without_clear_locks(start_worker, delay, history, label):
    doomed = start_worker(pool="solo", concurrency=1)
    first = do_stuff_with_short_ttl.apply_async((label,), queue=doomed.worker_queue)
    history.wait_for_starts(label)
    doomed.kill()
    assert delay(do_stuff_with_short_ttl, label) == first

    wait_until(lambda: not do_stuff_with_short_ttl.holder(label), "its ttl is over", timeout=5)

    second = delay(do_stuff_with_short_ttl, label)
    assert first != second
    open_gate(label)
    second.get(timeout=20)


def test_singleton_unique_on(delay, history, new_label):
    bob, alice = new_label(), new_label()
    first = delay(do_once_per_user, username=bob, otherarg=99)
    second = delay(do_once_per_user, username=bob, otherarg=100)
    other = delay(do_once_per_user, username=alice, otherarg=99)
    open_gate(bob, alice)

    assert first == second
    assert first != other
    assert [first.get(timeout=20), other.get(timeout=20)] == [99, 99]
    assert len(history.runs(bob)) == 1


def test_singleton_raise_on_duplicate(delay, label):
    first = delay(do_something, label)

    assert_already_queued(first, delay, do_something, label)


@pytest.mark.parametrize("given", [None, "skip"], ids=["by the app", "overridden by the task"])
def test_singleton_raise_on_duplicate_for_the_whole_app(delay, new_app, label, given):
    def never_run(*args, **kwargs):
        """The worker runs the other one."""

    app = new_app(singleton_on_conflict="fail")
    same = {"name": do_stuff.name, "lock_phase": do_stuff.lock_phase, "on_conflict": given}
    task = app.task(base=SingletonTask, shared=False, **same)(never_run)
    first = delay(task, label)

    if given:
        assert delay(task, label) == first
    else:
        assert_already_queued(first, delay, task, label)
    open_gate(label)
    assert first.get(timeout=20) == "woke up"


def test_singleton_lock_expiry_but_never_two_side_by_side(delay, history, label):
    first = delay(do_once_in_a_while, label)
    (run,) = history.wait_for_starts(label)

    frame = do_once_in_a_while.lock_at_least_for
    wait_until(lambda: time.monotonic() > run.start + frame + 0.2, "its time frame is over")

    assert delay(do_once_in_a_while, label) == first


# celery-once -------------------------------------------------------------------------------------


def test_once_already_queued(delay, history, label):
    first = delay(slow_task, label)
    assert_already_queued(first, delay, slow_task, label)
    history.wait_for_starts(label)
    assert_already_queued(first, delay, slow_task, label)

    open_gate(label)

    assert first.get(timeout=20) == "Done!"
    assert delay(slow_task, label).get(timeout=20) == "Done!"
    assert len(history.runs(label)) == 2


def test_once_a_direct_call_is_not_affected(delay, history, label):
    delay(slow_task, label)
    history.wait_for_starts(label)

    with ThreadPoolExecutor() as executor:
        called = executor.submit(slow_task, label)
        history.wait_for_starts(label, count=2)  # beside the first
        open_gate(label)

    assert called.result() == "Done!"


def test_once_graceful(delay, history, label):
    first = delay(slow_task_graceful, label)

    second = delay(slow_task_graceful, label)

    assert second.is_duplicate
    open_gate(label)
    assert first.get(timeout=20) == "Done!"
    assert len(history.runs(label)) == 1


def test_once_all_arguments_count(delay, history, label):
    first = delay(slow_add, label, 1)
    second = delay(slow_add, label, 2)

    assert first != second
    history.wait_for_starts(label, count=2)


def test_once_keys(delay, new_label):
    one, two = new_label(), new_label()
    first = delay(slow_add_by_a, one, 1)

    assert_already_queued(first, delay, slow_add_by_a, one, 2)

    other = delay(slow_add_by_a, two, 2)
    open_gate(one, two)
    assert [first.get(timeout=20), other.get(timeout=20)] == [1, 2]


def test_once_no_keys(delay, new_label):
    one, two = new_label(), new_label()
    first = delay(slow_add_alone, one, 1)

    assert_already_queued(first, delay, slow_add_alone, two, 2)

    open_gate(one)
    assert first.get(timeout=20) == 1


def test_once_timeout_need_not_be_longer_than_the_body(delay, history, label):
    first = delay(long_running_task, label)
    (run,) = history.wait_for_starts(label)

    beyond = run.start + 1.2 * long_running_task.lock_ttl
    wait_until(lambda: time.monotonic() > beyond, "its ttl would be over")

    assert_already_queued(first, delay, long_running_task, label)


def test_once_timeout_ends_what_a_lost_message_has_locked(app, label):
    queue = f"nobodys-{label}"
    first = lost_task.apply_async((label,), queue=queue)
    with app.connection_for_write() as connection:
        connection.default_channel.queue_purge(queue)
    with pytest.raises(LockHeldError):
        lost_task.apply_async((label,), queue=queue)

    wait_until(lambda: not lost_task.holder(label), "it is over", timeout=5)

    assert lost_task.apply_async((label,), queue=queue, expires=0.1) != first
    wait_until(lambda: not lost_task.holder(label), "it has expired", timeout=5)


def test_once_unlock_before_run(delay, history, label):
    first = delay(unlock_before_run, label)
    history.wait_for_starts(label)

    second = delay(unlock_before_run, label)
    third = delay(unlock_before_run, label)

    assert first != second
    assert second == third
    assert [second.is_duplicate, third.is_duplicate] == [False, True]
    open_gate(label)
    assert [first.get(timeout=20), second.get(timeout=20)] == ["Done!"] * 2
    assert len(history.runs(label)) == 2


def test_once_unlock_before_run_without_its_caveat(delay, label):
    open_gate(label)
    first = delay(unlock_before_run, label, is_to_retry=True)
    wait_until(lambda: first.state == states.RETRY, "it waits for its retry")

    assert delay(unlock_before_run, label, is_to_retry=True) == first

    assert first.get(timeout=20) == "Done!"


def test_once_unlock_before_run_with_keys_loses_no_call(delay, history, label):
    first = delay(unlock_before_run_by_a, label, 1)
    history.wait_for_starts(label)

    others = [delay(unlock_before_run_by_a, label, b) for b in (2, 3, 3)]

    assert [each.is_duplicate for each in others] == [False, False, False]
    open_gate(label)
    assert [each.get(timeout=20) for each in (first, *others)] == [1, 2, 3, 3]


def test_once_flask(delay, label):
    first = delay(example_task, label)

    assert_already_queued(first, delay, example_task, label)

    open_gate(label)
    assert first.get(timeout=20) == "shop"


# celery-heimdall ---------------------------------------------------------------------------------


def test_heimdall_ten_times_the_button_is_one_report(delay, history, label):
    results = [delay(generate_report, label) for _ in range(10)]
    open_gate(label)

    results[-1].get(timeout=20)

    assert len({each.id for each in results}) == 1
    assert len(history.runs(label)) == 1


def test_heimdall_expiry_of_what_is_stuck(delay, history, label):
    first = delay(generate_report_within, label)
    history.wait_for_starts(label)
    with pytest.raises(TimeLimitExceeded):
        first.get(timeout=20)

    wait_until(lambda: not generate_report_within.holder(label), "it is free", timeout=5)

    open_gate(label)
    delay(generate_report_within, label).get(timeout=20)


def test_heimdall_custom_key(delay, history, new_label):
    one, two = new_label(), new_label()
    first = delay(generate_report_alone, one)

    second = delay(generate_report_alone, two)

    assert first == second
    open_gate(one, two)
    first.get(timeout=20)
    assert not history.runs(two)


def test_heimdall_one_key_for_several_tasks(delay, label):
    first = delay(generate_invoice, label)

    assert delay(generate_statement, label) == first

    open_gate(label)
    first.get(timeout=20)


def test_heimdall_the_existing_task(delay, history, label):
    first = delay(generate_report, label)
    while_queued = delay(generate_report, label)
    history.wait_for_starts(label)
    while_running = delay(generate_report, label)
    open_gate(label)
    first.get(timeout=20)
    afterwards = delay(generate_report, label)
    afterwards.get(timeout=20)

    assert {while_queued.id, while_running.id} == {first.id}
    assert [while_queued.is_duplicate, while_running.is_duplicate] == [True, True]
    assert [each.task_id for each in history.runs(label)] == [first.id, afterwards.id]


def test_heimdall_unique_raises(delay, label):
    first = delay(generate_report_or_raise, label)

    assert_already_queued(first, delay, generate_report_or_raise, label)


def test_heimdall_unique_interval_and_singleton_lock_expiry(delay, history, label):
    open_gate(label)
    first = delay(do_once_in_a_while, label)
    first.get(timeout=20)
    early = delay(do_once_in_a_while, label)
    wait_until(lambda: not do_once_in_a_while.holder(label), "the interval is over")
    late = delay(do_once_in_a_while, label)

    assert early == first
    assert late != first
    late.get(timeout=20)
    one, other = history.runs(label)
    assert other.start - one.start >= do_once_in_a_while.lock_at_least_for
