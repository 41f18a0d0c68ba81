"""R7: a run that cannot ask for its lock is not run and not lost."""

from __future__ import annotations

import signal

import celery
import pytest

from servers import redis_or_skip
from waiting import wait_until
from worker_app import run, run_late

AWAY = "runs go back to their queue"


@pytest.fixture
def own_store():
    """A Redis for locks that this test may end."""
    with redis_or_skip() as server:
        yield server


@pytest.fixture
def broker():
    """A broker that this test may end."""
    with redis_or_skip() as server:
        yield server


@pytest.fixture
def send(app, broker):
    """Publishes to that broker."""

    def send(task, label, worker):
        with app.connection(broker.url()) as connection:
            task.apply_async((label,), queue=worker.worker_queue, connection=connection)

    return send


def wait_for_acknowledgement(worker, broker):
    """Until the run is in its slot, and nowhere else."""
    worker.wait_for_log("received")
    with broker.client() as client:
        wait_until(lambda: not client.exists("unacked"), "the message is acknowledged")


@pytest.mark.parametrize("task", [run, run_late])
def test_a_run_waits_in_its_queue_until_the_store_is_back(
    start_worker, own_store, history, label, task
):
    worker = start_worker(concurrency=1, singleton_store_url=own_store.url())
    own_store.kill()
    results = [task.apply_async((f"{label}{n}",), queue=worker.worker_queue) for n in range(5)]
    worker.wait_for_log(AWAY)
    wait_until(lambda: worker.logs().count("ignored") >= 5, "all five were put back")
    assert history.runs(*(f"{label}{n}" for n in range(5))) == []

    own_store.restart()

    assert [result.get(timeout=20) for result in results] == [f"{label}{n}" for n in range(5)]
    assert worker.logs().count(AWAY) == 1, "one warning per outage"
    assert worker.logs().count("answers again") == 1


def test_a_store_that_takes_commands_and_does_not_answer_loses_no_run(
    start_worker, own_store, history, label, held_locks
):
    worker = start_worker(concurrency=2, singleton_store_url=own_store.url())
    own_store.process.send_signal(signal.SIGSTOP)
    try:
        result = run.apply_async((label,), queue=worker.worker_queue)
        worker.wait_for_log(AWAY)
    finally:
        own_store.process.send_signal(signal.SIGCONT)

    # What was sent is carried out late: the lock is taken, and given back, by nobody's run.
    assert result.get(timeout=40) == label
    assert len(history.runs(label)) == 1
    wait_until(lambda: not held_locks(), "the lock is gone")


def test_with_the_broker_away_too_a_run_waits_in_its_slot(
    start_worker, own_store, broker, send, history, label
):
    worker = start_worker(
        concurrency=1, singleton_store_url=own_store.url(), broker_url=broker.url()
    )
    own_store.process.send_signal(signal.SIGSTOP)
    try:
        send(run, label, worker)
        wait_for_acknowledgement(worker, broker)
        broker.kill()
        worker.wait_for_log(AWAY)
        assert history.runs(label) == []
    finally:
        own_store.process.send_signal(signal.SIGCONT)

    history.wait_for_ends(label)


def test_a_worker_that_waits_for_both_shuts_down_and_logs_what_early_acknowledgement_loses(
    start_worker, own_store, broker, send, history, label
):
    worker = start_worker(
        concurrency=1, singleton_store_url=own_store.url(), broker_url=broker.url()
    )
    own_store.process.send_signal(signal.SIGSTOP)
    send(run, label, worker)
    wait_for_acknowledgement(worker, broker)
    broker.kill()
    worker.wait_for_log(AWAY)

    worker.container.kill("SIGTERM")
    worker.wait_for_log("is lost")
    if celery.VERSION >= (5, 6):  # before, Celery looks for its broker for half a minute first
        worker.container.wait_for_exit()

    (line,) = [line for line in worker.logs().splitlines() if "is lost" in line]
    assert f"args=['{label}']" in line
    assert history.runs(label) == []
