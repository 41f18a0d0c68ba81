"""Reservations with real workers: from the publish to the start, and every way to miss it."""

from __future__ import annotations

import os
import signal

import pytest
from celery import chord, group, states
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError

from celery_singleton_lock import DuplicateTaskError, LockHeldError, SingletonTask
from celery_singleton_lock.locks import AppLocks
from celery_singleton_lock.phases import reserved_key
from celery_singleton_lock.publishing import RESERVED
from celery_singleton_lock.stores.base import Claimant
from fault_proxy import FaultProxy
from phase_tasks import (
    REFUSE_ONCE,
    hold_once,
    hold_once_briefly_reserved,
    hold_once_late,
    hold_one_ahead,
    hold_one_ahead_impatiently,
    retry_after_gate,
    retry_and_go_on,
    retry_elsewhere,
    retry_one_ahead,
    return_at_once,
)
from servers import redis_or_skip
from waiting import wait_until
from wiretap import wiretap
from worker_app import LOCK_KEYS, collect, open_gate


def key_of(task, label):
    options = task._lock_options
    return reserved_key(options, options.key("singleton:", (label,), {}))


@pytest.fixture
def is_free(label):
    """Whether nothing is reserved or held for the label any more."""

    def is_free(task):
        store = AppLocks.of(task.app).store
        return lambda: store.holder(key_of(task, label)) is None

    return is_free


@pytest.fixture
def publish(worker, label):
    def publish(task, *args, **options):
        return task.apply_async((label, *args), queue=worker.worker_queue, **options)

    return publish


@pytest.fixture
def broker_proxy():
    with redis_or_skip() as server:
        proxy = FaultProxy(server.port)
        yield proxy
        proxy.stop()


# the plain life of a reservation -----------------------------------------------------------------


def test_a_duplicate_has_the_firsts_outcome(publish, history, label):
    first = publish(hold_once)
    history.wait_for_starts(label)

    second = publish(hold_once)
    open_gate(label)

    assert second.is_duplicate
    assert second.holder.task_id == first.id
    assert second.holder.fencing_token > 0
    assert second.get(timeout=20) == label
    assert len(history.runs(label)) == 1


@pytest.mark.parametrize("worker", ["prefork", "threads", "gevent"], indirect=True)
def test_called_again_and_again_it_runs_every_time(publish, label, worker):
    results = []
    for _ in range(50):
        results.append(publish(return_at_once))
        results[-1].get(timeout=20)

    assert not any(each.is_duplicate for each in results)
    assert len({each.get() for each in results}) == 50


def test_one_runs_and_one_waits_and_the_others_are_duplicates_of_that(publish, history, label):
    first = publish(hold_one_ahead)
    history.wait_for_starts(label)

    second = publish(hold_one_ahead)
    others = [publish(hold_one_ahead) for _ in range(3)]

    assert not second.is_duplicate
    assert {each.holder.task_id for each in others} == {second.id}
    wait_until(lambda: second.state == states.PENDING, "it waits")
    open_gate(label)
    assert [first.get(timeout=20), second.get(timeout=20)] == [label] * 2
    assert {each.task_id for each in history.runs(label)} == {first.id, second.id}


def test_what_waits_stays_reserved_while_it_is_put_back(worker, publish, history, label):
    publish(hold_one_ahead)
    history.wait_for_starts(label)
    second = publish(hold_one_ahead)
    wait_until(
        lambda: worker.logs().count(f"[{second.id}] goes back to the queue") >= 2, "it went back"
    )

    assert publish(hold_one_ahead).holder.task_id == second.id


# retries and dead children -----------------------------------------------------------------------


@pytest.mark.parametrize("task", [retry_after_gate, retry_one_ahead])
def test_between_its_attempts_it_is_no_less_one(publish, history, label, is_free, task):
    first = publish(task)
    wait_until(lambda: first.state == states.RETRY, "it waits for its retry")

    second = publish(task)

    assert second.is_duplicate
    assert second.holder.task_id == first.id
    assert second.get(timeout=20) == label
    assert [each.retries for each in history.runs(label)] == [0, 1]
    wait_until(is_free(task), "nothing is left")


def test_a_retry_that_does_not_end_the_body_keeps_it_after_that(publish, history, label, worker):
    first = publish(retry_and_go_on)
    history.wait_for_starts(label)
    open_gate(label)
    wait_until(lambda: f"[{first.id}] succeeded" in worker.logs(), "the first attempt is over")

    second = publish(retry_and_go_on)

    assert second.holder.task_id == first.id
    history.wait_for_ends(label, count=2)


def test_a_killed_child_gives_it_back(publish, history, label, is_free):
    first = publish(hold_once)
    (run,) = history.wait_for_starts(label)

    os.kill(run.pid, signal.SIGKILL)

    wait_until(lambda: first.state == states.FAILURE, "Celery has noticed")
    wait_until(is_free(hold_once), "it is free")
    assert not publish(hold_once).is_duplicate


def test_a_killed_child_whose_message_comes_again_keeps_it(publish, history, label):
    first = publish(hold_once_late)
    (run,) = history.wait_for_starts(label)
    os.kill(run.pid, signal.SIGKILL)

    duplicates = [publish(hold_once_late)]
    history.wait_for_starts(label, count=2)
    duplicates.append(publish(hold_once_late))
    open_gate(label)

    assert {each.holder.task_id for each in duplicates} == {first.id}
    assert first.get(timeout=20) == label


@pytest.mark.parametrize(
    "task", [pytest.param(each, id=name) for name, each in REFUSE_ONCE.items()]
)
def test_a_run_that_another_hook_refuses_gives_it_back(publish, is_free, task):
    publish(task)

    wait_until(is_free(task), "it is free")


def test_a_retry_with_another_lock_keeps_that_and_not_its_own(publish, history, label, new_label):
    other = new_label()
    first = publish(retry_elsewhere, other)
    history.wait_for_starts(label)
    store = AppLocks.of(retry_elsewhere.app).store
    wait_until(lambda: store.holder(key_of(retry_elsewhere, other)), "the other is reserved")
    open_gate(label)

    history.wait_for_starts(other)
    wait_until(
        lambda: not any(store.holder(key_of(retry_elsewhere, each)) for each in (label, other)),
        "both are free",
    )
    assert first.get(timeout=20) in (label, other)  # both of its attempts succeed


def test_one_that_has_waited_too_long_gives_it_back(publish, history, label, is_free):
    publish(hold_one_ahead_impatiently)
    history.wait_for_starts(label)
    second = publish(hold_one_ahead_impatiently)

    with pytest.raises(LockHeldError):
        second.get(timeout=20)

    wait_until(is_free(hold_one_ahead_impatiently), "nothing waits")


# messages that are never run ---------------------------------------------------------------------


@pytest.mark.parametrize("task", [hold_once, hold_one_ahead])
def test_a_revoked_message_gives_it_back(publish, is_free, task):
    first = publish(task, countdown=3)

    first.revoke()

    with pytest.raises(TaskRevokedError):
        first.get(timeout=20)
    wait_until(is_free(task), "it is free")


def test_an_expired_message_gives_it_back(publish, is_free):
    first = publish(hold_once, countdown=1.5, expires=1)

    with pytest.raises(TaskRevokedError):
        first.get(timeout=20)
    wait_until(is_free(hold_once), "it is free")


def test_a_revoked_retry_gives_it_back(publish, is_free):
    first = publish(retry_after_gate)
    wait_until(lambda: first.state == states.RETRY, "it waits for its retry")

    first.revoke()

    wait_until(is_free(retry_after_gate), "it is free")


def test_a_message_that_no_worker_knows_gives_it_back(app, worker, label, is_free):
    key = key_of(hold_once, label)
    AppLocks.of(app).store.reserve(key, Claimant("gone", "publisher", 1), 60.0)

    app.send_task("gone", task_id="gone", queue=worker.worker_queue, headers={RESERVED: key})

    wait_until(is_free(hold_once), "it is free")


def test_a_purged_message_is_waited_for_until_its_reservation_ends(app, label, is_free):
    queue = f"nobodys-{label}"
    first = hold_once_briefly_reserved.apply_async((label,), queue=queue)
    with app.connection_for_write() as connection:
        connection.default_channel.queue_purge(queue)

    assert hold_once_briefly_reserved.apply_async((label,), queue=queue).holder.task_id == first.id

    wait_until(is_free(hold_once_briefly_reserved), "it is over")


def test_a_broker_that_cannot_be_reached_gives_it_back(new_app, label, is_free):
    app = new_app(broker_url="redis://127.0.0.1:1/0", task_publish_retry=False)

    with pytest.raises(OperationalError):
        bound_to(app, hold_once).delay(label)

    assert is_free(hold_once)()


@pytest.mark.parametrize("retries", [False, True], ids=["once", "with retries"])
def test_a_broker_that_is_gone_by_now_gives_it_back(
    new_app, broker_proxy, new_label, label, is_free, retries
):
    policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    app = new_app(
        broker_url=broker_proxy.url(),
        task_publish_retry=retries,
        task_publish_retry_policy=policy,
    )
    task = bound_to(app, hold_once_briefly_reserved)
    task.apply_async((new_label(),), queue=f"nobodys-{label}")  # leaves its connection open
    broker_proxy.refuse()

    with pytest.raises(OperationalError):
        task.apply_async((label,), queue=f"nobodys-{label}")

    assert is_free(hold_once)()


@pytest.mark.parametrize("retries", [False, True], ids=["once", "with retries"])
def test_a_lost_confirmation_counts_as_published(new_app, broker_proxy, label, is_free, retries):
    policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    app = new_app(
        broker_url=broker_proxy.url(),
        task_publish_retry=retries,
        task_publish_retry_policy=policy,
    )
    task = bound_to(app, hold_once, lock_ttl=1.0)
    broker_proxy.lose_replies(once=True, names={"LPUSH"})

    with pytest.raises(OperationalError):
        task.apply_async((label,), queue=f"nobodys-{label}")

    assert not is_free(hold_once)()
    wait_until(is_free(hold_once), "one ttl is over, not one lock_reservation_ttl")


# settled at start --------------------------------------------------------------------------------


def test_members_of_a_chord_are_published_and_told(publish, worker, history, label):
    publish(hold_once)
    history.wait_for_starts(label)

    header = [hold_once.si(label).set(queue=worker.worker_queue) for _ in range(2)]
    result = chord(header, collect.s().set(queue=worker.worker_queue))()

    with pytest.raises(Exception, match="skipped"):
        result.get(timeout=20)
    assert len(history.runs(label)) == 1


def test_members_of_a_group_run_where_nothing_is_reserved(worker, history, label):
    members = group(hold_once.si(label).set(queue=worker.worker_queue) for _ in range(3))

    result = members.apply_async()
    history.wait_for_starts(label)
    wait_until(lambda: sum(each.ready() for each in result) == 2, "the others are told")
    open_gate(label)

    outcomes = [each.get(timeout=20, propagate=False) for each in result]
    assert outcomes.count(label) == 1
    assert sum(isinstance(each, DuplicateTaskError) for each in outcomes) == 2


def test_who_does_not_call_the_task_meets_what_is_reserved(app, worker, publish, label):
    first = publish(hold_once, countdown=3)

    bypassing = app.send_task(hold_once.name, (label,), queue=worker.worker_queue)

    with pytest.raises(DuplicateTaskError) as caught:
        bypassing.get(timeout=20)
    assert caught.value.holder.task_id == first.id
    open_gate(label)
    assert first.get(timeout=20) == label


def test_what_an_older_release_reserved_is_given_back_at_the_start(app, worker, history, label):
    for bucket in (0, 1):  # one is not the lock's own
        key = f"singleton:{{{bucket}}}:1:worker_app.older:{label}"
        task_id = f"{label}-{bucket}"
        AppLocks.of(app).store.reserve(key, Claimant(task_id, "publisher", 1), 60.0)

        result = return_at_once.apply_async(
            (f"{label}-{bucket}",),
            queue=worker.worker_queue,
            task_id=task_id,
            headers={RESERVED: key},
        )

        assert result.get(timeout=20) == task_id
        assert AppLocks.of(app).store.holder(key) is None


# what it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [hold_once, hold_one_ahead])
def test_a_publish_costs_one_round_trip_more_and_a_run_none(
    start_worker, new_app, private_server, new_label, task
):
    url = private_server.url()
    worker = start_worker(pool="solo", concurrency=1, singleton_store_url=url)
    bound = bound_to(new_app(singleton_store_url=url), task)
    send = {"queue": worker.worker_queue}
    warm, label = new_label(), new_label()
    open_gate(warm, label)
    bound.apply_async((warm,), **send).get(timeout=20)
    with private_server.client() as client:
        wait_until(lambda: not client.keys(LOCK_KEYS), "what warmed it up is over")

    with wiretap(private_server) as tap:
        bound.apply_async((label,), **send).get(timeout=20)
        wait_until(lambda: not tap.client.keys(LOCK_KEYS), "the lock is released")

    assert [command.words[0] for command in tap.commands] == ["EVALSHA"] * 3


def test_a_duplicate_costs_one_round_trip_and_leaves_no_message(
    start_worker, new_app, private_server, history, label
):
    url = private_server.url()
    worker = start_worker(pool="solo", concurrency=1, singleton_store_url=url)
    app = new_app(singleton_store_url=url)
    task, send = bound_to(app, hold_once, lock_ttl=300.0), {"queue": worker.worker_queue}
    first = task.apply_async((label,), **send)
    history.wait_for_starts(label)

    with wiretap(private_server) as tap:
        duplicates = [task.apply_async((label,), **send) for _ in range(1000)]

    assert [command.words[0] for command in tap.commands] == ["EVALSHA"] * 1000
    assert {each.id for each in duplicates} == {first.id}
    with app.connection_for_write() as connection:
        assert connection.default_channel.queue_declare(worker.worker_queue).message_count == 0
    open_gate(label)
    assert first.get(timeout=20) == label


def bound_to(app, task, **options):
    """The same task, as another app publishes it."""
    same = ("name", "lock_name", "lock_args", "lock_phase", "lock_reservation_ttl", "on_conflict")
    given = {name: getattr(task, name) for name in same}
    return app.task(base=SingletonTask, shared=False, **given, **options)(never_run)


def never_run(label):
    """Workers run the other one."""
