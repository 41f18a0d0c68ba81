"""The promises over RabbitMQ, which redelivers at once; locks and results are in Redis."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime, timedelta, timezone
from uuid import uuid4

import celery
import psutil
import pytest

from ending_tasks import end_late
from lock_watch import executes
from phase_tasks import hold_once
from rabbitmq_server import GivenRabbitmq, given_url
from rerun_tasks import effect_of, update
from servers import rabbitmq_or_skip
from timeline import overlaps
from waiting import wait_until
from worker_app import count, die_once, hold, open_gate, run, run_later, tell_message

BACK = "goes back to the queue"


@pytest.fixture(scope="module")
def rabbitmq():
    url = given_url()
    if url:
        yield GivenRabbitmq(url)
        return
    with rabbitmq_or_skip() as server:
        yield server


@pytest.fixture
def close_connections(rabbitmq):
    """Closes what the workers have at the broker."""
    if isinstance(rabbitmq, GivenRabbitmq):
        pytest.skip("closes all connections at its RabbitMQ: not at one that was given")
    return rabbitmq.close_connections


@pytest.fixture
def start_workers(launch_worker, rabbitmq):
    """Starts workers that share a queue: ``start_workers(2, concurrency=1, **settings)``."""

    def start_workers(number=1, **options):
        options = {"broker_url": rabbitmq.url, "task_default_queue": uuid4().hex, **options}
        workers = [launch_worker(name=f"worker-{n}", **options) for n in range(number)]
        assert all(worker.ready() for worker in workers)
        return workers

    return start_workers


@pytest.fixture
def send(app, rabbitmq):
    """Publishes to the queue of a worker: ``send(worker, task, *args, **options)``."""

    def send(worker, task, *args, **options):
        with app.connection(rabbitmq.url) as connection:
            return task.apply_async(
                args, queue=worker.worker_queue, connection=connection, **options
            )

    return send


@pytest.fixture
def wait_for_empty_queue(rabbitmq):
    """Waits until no message of a worker's queue is left, neither there nor in a worker's hands."""

    def wait_for_empty_queue(worker):
        queue = worker.worker_queue
        wait_until(lambda: rabbitmq.messages(queue) == 0, "every message is acknowledged")

    return wait_for_empty_queue


@pytest.mark.parametrize("others", [0, 10], ids=["alone", "among others"])
def test_a_killed_workers_run_is_redelivered_and_waits_until_the_dead_ones_lock_lapses(
    start_workers, send, history, label, wait_for_empty_queue, others
):
    # Given a run, and others that want its lock
    workers = start_workers(2, concurrency=1, task_acks_late=True, singleton_lock_ttl=4.0)
    result = send(workers[0], hold, label)
    (first,) = history.wait_for_starts(label)
    results = [result, *(send(workers[0], run_later, label) for _ in range(others))]
    workers.sort(
        key=lambda worker: worker.container.process.pid == psutil.Process(first.pid).ppid()
    )
    survivor, owner = workers

    # When the main process of its worker is killed, and with it the child
    owner.container.process.kill()
    wait_until(lambda: not executes(first.pid), "the child is dead")
    first = first._replace(end=time.monotonic())
    open_gate(label)

    # Then its message goes to the other worker at once, meets the lock, and is not dropped
    wait_until(lambda: f"[{result.id}] {BACK}" in survivor.logs(), "the copy met the lock")
    for each in results:
        each.get(timeout=40)
    runs = [first, *history.wait_for_ends(label, count=1 + others)[1:]]
    assert [each.task_id for each in runs].count(result.id) == 2
    assert len(runs) == 2 + others
    assert overlaps(runs) == 0
    assert runs[1].fencing_token > first.fencing_token
    wait_for_empty_queue(survivor)


def test_a_killed_childs_lock_is_free_before_its_message_is_back(
    start_workers, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers()

    result = send(worker, die_once, label)

    assert result.get(timeout=20) == label
    first, second = history.wait_for_ends(label)
    assert (first.task_id, first.is_over) == (second.task_id, False)
    assert not executes(first.pid)
    assert BACK not in worker.logs()
    wait_for_empty_queue(worker)


def test_a_body_that_sends_its_own_message_back_does_not_meet_its_own_lock(
    start_workers, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers(task_acks_late=True)

    result = send(worker, end_late, label, "body: Reject to the queue, once")

    assert result.get(timeout=20) == label
    first, second = history.wait_for_ends(label, count=2)
    assert first.task_id == second.task_id
    assert overlaps([first, second]) == 0
    assert BACK not in worker.logs()
    wait_for_empty_queue(worker)


def test_runs_that_wait_for_a_lock_let_others_by_and_all_run_in_the_end(
    start_workers, send, history, label, new_label, wait_for_empty_queue
):
    # Given one slot for ten contenders
    (worker,) = start_workers(concurrency=2)
    holder = send(worker, hold, label)
    history.wait_for_starts(label)
    contenders = [send(worker, run_later, label, number) for number in range(10)]
    for each in contenders:
        wait_until(lambda each=each: f"[{each.id}] {BACK}" in worker.logs(), "it was put back")

    # When other messages come, they are not starved
    other = new_label()
    others = [send(worker, run, f"{other}{n}") for n in range(20)]
    assert [each.get(timeout=20) for each in others] == [f"{other}{n}" for n in range(20)]
    assert not holder.ready()

    # Then each contender runs once
    open_gate(label)
    assert [each.get(timeout=40) for each in contenders] == list(range(10))
    runs = history.wait_for_ends(label, count=11)
    assert sorted(each.task_id for each in runs[1:]) == sorted(each.id for each in contenders)
    assert overlaps(runs) == 0
    wait_for_empty_queue(worker)


def test_a_message_that_was_put_back_says_what_it_said_before(
    start_workers, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers()
    send(worker, hold, label)
    history.wait_for_starts(label)
    expires = datetime.now(timezone.utc) + timedelta(minutes=5)

    told = send(worker, tell_message, label, headers={"mine": 1}, priority=3, expires=expires)
    wait_until(lambda: worker.logs().count(f"[{told.id}] {BACK}") >= 2, "it was put back twice")
    open_gate(label)

    headers, priority, expires_then = told.get(timeout=20)
    assert (headers["mine"], priority) == (1, 3)
    assert datetime.fromisoformat(expires_then) == expires
    assert overlaps(history.wait_for_ends(label, count=2)) == 0
    wait_for_empty_queue(worker)


def test_fifty_runs_of_two_workers_count_to_fifty(
    start_workers, send, history, label, wait_for_empty_queue
):
    workers = start_workers(2)

    results = [send(workers[0], count, label) for _ in range(50)]

    assert sorted(each.get(timeout=60) for each in results) == list(range(1, 51))
    assert overlaps(history.wait_for_ends(label, count=50)) == 0
    wait_for_empty_queue(workers[0])


def test_a_run_that_outlives_its_connection_does_not_run_again(
    start_workers, close_connections, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers(task_acks_late=True)
    result = send(worker, hold, label)
    history.wait_for_starts(label)

    # When the connection is lost, a copy comes, meets the lock under its own id, and waits
    close_connections()
    wait_until(lambda: worker.logs().count(f"[{result.id}] received") > 1, "the copy is there")
    if celery.VERSION >= (5, 7):  # before, it stands in line for the child that runs the first
        wait_until(lambda: f"[{result.id}] {BACK}" in worker.logs(), "it met the lock")
    open_gate(label)

    # Then it ends without running, since the first one has succeeded
    assert result.get(timeout=20) == label
    wait_until(lambda: "has succeeded already" in worker.logs(), "the copy has ended")
    assert len(history.runs(label)) == 1
    wait_for_empty_queue(worker)


def test_a_run_that_is_cancelled_with_its_connection_runs_again(
    start_workers, close_connections, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers(
        task_acks_late=True, worker_cancel_long_running_tasks_on_connection_loss=True
    )
    result = send(worker, hold, label)
    history.wait_for_starts(label)

    close_connections()
    history.wait_for_starts(label, count=2)
    open_gate(label)

    assert result.get(timeout=20) == label
    runs = history.wait_for_ends(label, count=2)
    assert {each.task_id for each in runs} == {result.id}
    assert overlaps(runs) == 0
    wait_for_empty_queue(worker)


def test_a_run_that_was_acknowledged_early_outlives_its_connection(
    start_workers, close_connections, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers()
    result = send(worker, hold, label)
    history.wait_for_starts(label)

    close_connections()
    wait_until(lambda: worker.logs().count("Connected to amqp") > 1, "it is connected again")
    open_gate(label)

    assert result.get(timeout=20) == label
    assert len(history.runs(label)) == 1
    wait_for_empty_queue(worker)


def test_one_update_follows_a_run_and_a_killed_one_comes_again(
    start_workers, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers(concurrency=4)
    first = send(worker, update, label, 1)
    (run,) = history.wait_for_starts(label)
    *older, newest = [send(worker, update, label, number) for number in range(2, 8)]
    wait_until(lambda: f"[{newest.id}] {BACK}" in worker.logs(), "it was put back")

    os.kill(run.pid, signal.SIGKILL)
    open_gate(label)

    assert newest.get(timeout=30) == 7
    wait_until(lambda: all(each.ready() for each in [first, *older]), "all others are done with")
    assert effect_of(label) == 7
    assert overlaps([each for each in history.runs(label) if each.is_over]) == 0
    wait_for_empty_queue(worker)


def test_a_call_is_published_once_from_its_publish_to_its_end(
    start_workers, send, history, label, wait_for_empty_queue
):
    (worker,) = start_workers()
    first = send(worker, hold_once, label, countdown=1)

    duplicates = [send(worker, hold_once, label)]
    history.wait_for_starts(label)
    duplicates.append(send(worker, hold_once, label))
    open_gate(label)

    assert {each.id for each in duplicates} == {first.id}
    assert first.get(timeout=20) == label
    assert len(history.runs(label)) == 1
    wait_for_empty_queue(worker)
