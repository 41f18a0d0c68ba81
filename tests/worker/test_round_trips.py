"""R10, as the lock server counts it: what a run, a publish and a skipped duplicate cost."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_singleton_lock import DuplicateTaskError, SingletonTask
from waiting import wait_until
from wiretap import wiretap
from worker_app import LOCK_KEYS, hold, hold_for_long, open_gate, run


@pytest.fixture(params=["prefork", "threads", "solo", "gevent", "eventlet"])
def pool(request):
    return request.param


@pytest.fixture
def warm_worker(pool, start_worker, private_server, history, new_label, label):
    """A worker of which every slot has had a lock already."""
    slots = 1 if pool == "solo" else 2
    url = private_server.url()
    worker = start_worker(pool=pool, concurrency=slots, singleton_store_url=url)
    others = [new_label() for _ in range(slots)]
    for each in others:
        hold.apply_async((each,), queue=worker.worker_queue)
    history.wait_for_starts(*others, count=slots)
    open_gate(*others)
    with private_server.client() as client:
        wait_until(lambda: not client.keys(LOCK_KEYS), "what warmed it up is over")
        yield worker
        open_gate(label)
        wait_until(lambda: not client.keys(LOCK_KEYS), "the test's own run is over")


def names(tap):
    return [command.words[0] for command in tap.commands]


def test_a_run_costs_two_round_trips(warm_worker, private_server, new_label):
    with wiretap(private_server) as tap:
        for _ in range(20):
            run.apply_async((new_label(),), queue=warm_worker.worker_queue).get(timeout=10)
            wait_until(lambda: not tap.client.keys(LOCK_KEYS), "the lock is released")

    # A second slot may begin before the first has read that its lock is free: then it connects.
    asked = names(tap)
    assert asked.count("HELLO") <= 1
    assert [name for name in asked if name != "HELLO"] == ["EVALSHA"] * 2 * 20


def test_publishing_costs_no_round_trip(private_server):
    app = Celery("publisher", broker="memory://", set_as_current=False)
    app.conf.singleton_store_url = private_server.url()

    @app.task(base=SingletonTask, shared=False)
    def task(number):
        return number

    with wiretap(private_server) as tap:
        for number in range(20):
            task.delay(number)

    assert tap.commands == []


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet"])
def test_a_skipped_duplicate_costs_one_round_trip(warm_worker, private_server, history, label):
    hold.apply_async((label,), queue=warm_worker.worker_queue)
    history.wait_for_starts(label)

    with wiretap(private_server) as tap:
        for _ in range(20):
            duplicate = hold.apply_async((label,), queue=warm_worker.worker_queue)
            with pytest.raises(DuplicateTaskError):
                duplicate.get(timeout=10)

    assert names(tap) == ["EVALSHA"] * 20


@pytest.mark.parametrize("pool", ["prefork"])
def test_a_thousand_duplicates_at_once_cost_one_round_trip_each(
    warm_worker, private_server, history, label
):
    # Given a run whose lease needs no renewal meanwhile
    hold_for_long.apply_async((label,), queue=warm_worker.worker_queue)
    history.wait_for_starts(label)

    with wiretap(private_server) as tap:
        duplicates = [
            hold_for_long.apply_async((label,), queue=warm_worker.worker_queue) for _ in range(1000)
        ]
        for each in duplicates:
            with pytest.raises(DuplicateTaskError):
                each.get(timeout=20)

    assert names(tap) == ["EVALSHA"] * 1000
