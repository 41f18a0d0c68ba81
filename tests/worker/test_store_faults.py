"""R7: in whatever way a Redis fails, a run that meets it at its start is run once it is back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import celery
import pytest
import redis

import worker_app
from fault_proxy import FaultProxy
from servers import redis_or_skip
from timeline import overlaps
from waiting import wait_until
from worker_app import hold, hold_with_short_ttl, open_gate, run, run_late

AWAY = "runs go back to their queue"
PROCESSES = 2


class Fault(NamedTuple):
    """A way in which a Redis fails.

    Attributes:
        proxied: How the proxies do it.
        real: How the server does it by itself.
        over: How the server stops doing it.
    """

    proxied: Callable[[FaultProxy], None] = FaultProxy.heal
    real: Callable[[Any], Any] = lambda client: None
    over: Callable[[Any], Any] = lambda client: None


def _ask_for_password(client):
    client.config_set("requirepass", "s3cr3t-pw")
    client.client_kill_filter(_type="normal", skipme=True)


FAULTS = {
    "refused": Fault(FaultProxy.refuse),
    "silent": Fault(FaultProxy.freeze),
    "reset": Fault(FaultProxy.cut),
    "reply lost": Fault(FaultProxy.lose_replies),
    "loading": Fault(lambda proxy: proxy.answer("LOADING Redis is loading the dataset in memory")),
    "read only": Fault(
        real=lambda client: client.replicaof("127.0.0.1", "1"),
        over=lambda client: client.replicaof("NO", "ONE"),
    ),
    "out of memory": Fault(
        real=lambda client: client.config_set("maxmemory", 1),
        over=lambda client: client.config_set("maxmemory", 0),
    ),
    "password": Fault(
        real=_ask_for_password, over=lambda client: client.config_set("requirepass", "")
    ),
}


#: Not "read only", nor "refused" with a late acknowledged message: as a broker's failures they end
#: a Celery worker. Nor "reply lost": a broker is asked no scripts.
BROKER_FAULTS = [("refused", run)] + [
    (fault, task)
    for fault in ("silent", "reset", "loading", "out of memory", "password")
    for task in (run, run_late)
]


class Site:
    """One Redis with the locks and perhaps the messages of a worker, which reaches it by proxies.

    Args:
        server: The real one.
        store: The way to the locks.
        broker: The way to the messages, if they are there too.
    """

    def __init__(self, server: Any, store: FaultProxy, broker: FaultProxy | None = None) -> None:
        self.server, self.store, self.broker = server, store, broker
        self._clients = {database: server.client(database) for database in (0, 2)}

    def client(self, database: int = 0) -> redis.Redis:
        """A client of the real server."""
        return self._clients[database]

    def fail(self, fault: Fault) -> None:
        """Begin."""
        fault.real(self.client())
        if self.broker:
            fault.proxied(self.broker)
        fault.proxied(self.store)

    def recover(self, fault: Fault) -> None:
        """End."""
        fault.over(self.client())
        for proxy in filter(None, (self.broker, self.store)):
            proxy.heal()

    def messages(self, queue: str) -> int:
        """How many are in the queue, or with a worker that has not acknowledged them."""
        return self.client().llen(queue) + self.client().hlen("unacked")

    def wait_for_acknowledgement(self, queue: str) -> None:
        """Return when no message is left.

        A run in a thread may ask for its lock before its message is acknowledged, and no Celery
        worker survives what some failures of the broker make of that.
        """
        wait_until(lambda: not self.messages(queue), "the message is acknowledged")

    def locks(self) -> list[str]:
        """The keys of all locks that are held there."""
        return list(self.client(2).scan_iter(worker_app.LOCK_KEYS))


@pytest.fixture(scope="module")
def own_server():
    """A Redis that these tests may set as they like."""
    with redis_or_skip() as server:
        yield server


@pytest.fixture(scope="module")
def proxies():
    """All of them. They end with the process: so do the workers that reach their Redis by them."""
    return []


@pytest.fixture(scope="module")
def new_proxy(own_server, proxies):
    def new_proxy():
        proxies.append(FaultProxy(own_server.port))
        return proxies[-1]

    return new_proxy


@pytest.fixture(autouse=True)
def healed(proxies):
    """A test that fails takes no other with it."""
    yield
    for each in proxies:
        each.heal()


@pytest.fixture(scope="module")
def locks_away(launch, own_server, new_proxy):
    """A worker whose locks are in a Redis of their own."""
    site = Site(own_server, new_proxy())
    url = site.store.url(2) + "?socket_timeout=0.5"
    return site, launch(name="locks-away", concurrency=PROCESSES, singleton_store_url=url)


@pytest.fixture(scope="module")
def all_away(launch, own_server, new_proxy):
    """A worker of one process, whose locks and messages are in one Redis."""
    site = Site(own_server, new_proxy(), new_proxy())
    worker = launch(
        name="all-away",
        pool="threads",
        singleton_store_url=site.store.url(2),
        broker_url=site.broker.url(0),
    )
    return site, worker


def has_nothing_left(worker, site, log):
    """Whether each copy of a message that the worker has received has come to an end.

    An old kombu leaves one among the unacknowledged, if its connection broke meanwhile.
    """
    ended = log.count("] ignored") + log.count("] succeeded in")
    return ended == log.count("] received") and not site.client().llen(worker.worker_queue)


@pytest.mark.parametrize("fault", FAULTS)
def test_runs_that_meet_a_failure_of_the_store_go_back_to_their_queue_until_it_is_over(
    locks_away, new_log, history, new_label, fault
):
    site, worker = locks_away
    log = new_log(worker)
    labels = [new_label() for _ in range(6)]
    site.fail(FAULTS[fault])
    site.store.asked.clear()
    try:
        results = [
            task.apply_async((label,), queue=worker.worker_queue)
            for task, label in zip([run, run_late] * 3, labels, strict=True)
        ]

        def puts_back():
            return log().count("ignored")

        wait_until(lambda: puts_back() >= 12, "each was put back about twice")
        asked, ignored = len(site.store.asked), puts_back()
        assert history.runs(*labels) == []
    finally:
        site.recover(FAULTS[fault])

    assert [result.get(timeout=20) for result in results] == labels
    wait_until(lambda: not site.locks(), "no lock is left")
    runs = history.runs(*labels)
    assert sorted(each.label for each in runs) == sorted(labels), "each ran once"
    assert {each.retries for each in runs} == {0}
    assert 1 <= log().count(AWAY) <= PROCESSES, "one warning per outage and process"
    assert 1 <= log().count("answers again") <= PROCESSES
    assert not re.findall("WARNING.* ends with its ttl", log()), "no run had one"
    assert asked <= 4 * (ignored + PROCESSES), "no busy loop"


@pytest.mark.parametrize(("fault", "task"), BROKER_FAULTS)
def test_with_the_broker_in_the_same_redis_they_wait_in_their_slots(
    app, all_away, new_log, history, new_label, fault, task
):
    site, worker = all_away
    log = new_log(worker)
    label = new_label()
    # Given a run that has asked, and has no answer yet
    site.store.freeze()
    with app.connection(site.server.url()) as connection:
        result = task.apply_async((label,), queue=worker.worker_queue, connection=connection)
    wait_until(lambda: site.store.held, "it has asked")
    if task is run:
        site.wait_for_acknowledgement(worker.worker_queue)
    site.fail(FAULTS[fault])
    try:
        wait_until(lambda: AWAY in log(), "it knows")
        if fault != "silent":
            wait_until(lambda: "cannot go back" in log(), "it waits")
        assert history.runs(label) == []
    finally:
        site.recover(FAULTS[fault])

    assert result.get(timeout=20) == label
    wait_until(lambda: has_nothing_left(worker, site, log()), "no copy is left")
    wait_until(lambda: not site.locks(), "no lock is left")
    runs = history.runs(label)
    assert [each.retries for each in runs] == [0]
    assert log().count(AWAY) == 1, "one warning per outage"


def test_a_key_that_is_no_lock_is_named_and_its_run_waits_until_somebody_removes_it(
    locks_away, new_log, history, label
):
    site, worker = locks_away
    log = new_log(worker)
    first = hold.apply_async((label,), queue=worker.worker_queue)
    (lock,) = wait_until(site.locks, "the lock is taken")
    open_gate(label)
    first.get(timeout=20)
    wait_until(lambda: not site.locks(), "the lock is gone")
    site.client(2).set(lock, "somebody else's data")
    second = hold.apply_async((label,), queue=worker.worker_queue)
    wait_until(lambda: AWAY in log(), "it says that it waits")
    (line,) = [line for line in log().splitlines() if AWAY in line]
    assert "WRONGTYPE" in line
    assert line.endswith(lock)

    site.client(2).delete(lock)

    assert second.get(timeout=20) == label
    assert len(history.runs(label)) == 2


def test_copies_of_one_message_that_meet_a_failure_do_not_overlap(
    app, all_away, new_log, history, label
):
    # Given a run that has asked, and a broker that delivers its message again meanwhile
    site, worker = all_away
    log = new_log(worker)
    site.store.freeze()
    with app.connection(site.server.url()) as connection:
        result = run_late.apply_async((label,), queue=worker.worker_queue, connection=connection)
    wait_until(lambda: site.store.held, "it has asked")
    site.broker.cut()
    wait_until(lambda: "onnection to broker lost" in log(), "it is cut off")
    site.broker.heal()
    wait_until(lambda: log().count("received") >= 2, "it has come again")
    site.store.refuse()
    wait_until(lambda: log().count("ignored") >= 4, "both were put back")

    site.store.heal()

    assert result.get(timeout=20) == label
    wait_until(lambda: has_nothing_left(worker, site, log()), "no copy is left")
    runs = history.runs(label)
    assert overlaps(runs) == 0
    # Late acknowledgement is "at least once": the copy that is not marked as one may come second.
    assert len(runs) in (1, 2)


def test_a_run_that_never_heard_of_its_lock_gets_the_same_one_when_it_asks_again(
    app, all_away, new_log, history, label
):
    site, worker = all_away
    log = new_log(worker)
    site.store.freeze()
    with app.connection(site.server.url()) as connection:
        result = run.apply_async((label,), queue=worker.worker_queue, connection=connection)
    wait_until(lambda: site.store.held, "it has asked")
    site.wait_for_acknowledgement(worker.worker_queue)
    site.broker.refuse()
    site.store.lose_replies(once=True)
    (lock,) = wait_until(site.locks, "the lock is taken")
    taken = site.client(2).hgetall(lock)
    wait_until(lambda: "cannot go back" in log(), "it waits in its slot")

    site.store.heal()

    (only,) = history.wait_for_ends(label)
    assert only.task_id == result.id == taken["task_id"]
    assert only.fencing_token == int(taken["fencing_token"])
    site.broker.heal()
    assert result.get(timeout=20) == label
    wait_until(lambda: not site.locks(), "no lock is left")


def test_a_run_that_never_heard_of_its_lock_and_went_back_runs_when_the_ttl_is_over(
    locks_away, new_log, history, label
):
    site, worker = locks_away
    log = new_log(worker)
    open_gate(label)
    site.store.lose_replies(once=True)
    result = hold_with_short_ttl.apply_async((label,), queue=worker.worker_queue)
    (lock,) = wait_until(site.locks, "the lock is taken")
    taken = site.client(2).hgetall(lock)
    wait_until(lambda: "ignored" in log(), "it went back")
    assert site.locks() == [lock]

    site.store.heal()

    assert result.get(timeout=20) == label
    (only,) = history.runs(label)
    assert only.task_id == result.id == taken["task_id"]
    assert only.fencing_token > int(taken["fencing_token"])


@pytest.mark.parametrize("fault", ["refused", "silent", "loading"])
def test_a_body_outlives_a_failure_that_is_shorter_than_its_ttl(
    locks_away, new_log, history, label, fault
):
    site, worker = locks_away
    log = new_log(worker)
    result = hold_with_short_ttl.apply_async((label,), queue=worker.worker_queue)
    (running,) = history.wait_for_starts(label)
    site.fail(FAULTS[fault])
    try:
        # In the process of the body and in the main one.
        wait_until(lambda: log().count("cannot be renewed") >= 2, "renewal has failed")
    finally:
        site.recover(FAULTS[fault])
    wait_until(lambda: log().count("are renewed") >= 2, "it goes on")

    (lock,) = site.locks()
    wait_until(lambda: time.monotonic() > running.start + 4, "its first ttl is over")
    assert site.client(2).hget(lock, "fencing_token") == str(running.fencing_token)
    open_gate(label)
    assert result.get(timeout=20) == label
    assert "lost its lease" not in log()


def test_a_release_that_the_store_does_not_answer_leaves_the_lock_to_its_ttl(
    locks_away, new_log, history, label
):
    site, worker = locks_away
    log = new_log(worker)
    result = hold_with_short_ttl.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    site.store.refuse()
    try:
        open_gate(label)
        assert result.get(timeout=20) == label
        wait_until(lambda: "ends with its ttl" in log(), "it says so")
    finally:
        site.store.heal()

    assert result.state == "SUCCESS"
    assert len(re.findall("WARNING.* ends with its ttl", log())) == 1
    wait_until(lambda: not site.locks(), "the lock is gone", timeout=10)


def test_a_worker_that_stops_while_the_store_is_away_leaves_its_runs_in_their_queue(
    start_worker, own_server, new_proxy, redis_server, history, new_label
):
    # Given an early and a late acknowledged run that have asked, and have no answer yet
    store, labels = new_proxy(), [new_label(), new_label()]
    worker = start_worker(concurrency=2, singleton_store_url=store.url(2))
    store.freeze()
    results = [
        task.apply_async((label,), queue=worker.worker_queue)
        for task, label in zip([run, run_late], labels, strict=True)
    ]
    wait_until(lambda: store.held == 2, "both have asked")

    worker.container.kill("SIGTERM")

    assert worker.container.wait_for_exit() == 0
    assert worker.logs().index("Warm shutdown") < worker.logs().index(AWAY)
    with redis_server.client() as client:
        assert client.llen(worker.worker_queue) == 2
    assert "is lost" not in worker.logs()
    assert history.runs(*labels) == []

    # And the next worker runs them
    store.heal()
    worker.container.start()
    assert [result.get(timeout=20) for result in results] == labels
    assert len(history.runs(*labels)) == 2


def test_a_worker_that_stops_while_both_are_away_leaves_a_late_acknowledged_run_with_the_broker(
    app, start_worker, own_server, new_proxy, history, label
):
    site = Site(own_server, new_proxy(), new_proxy())
    worker = start_worker(
        concurrency=1, singleton_store_url=site.store.url(2), broker_url=site.broker.url()
    )
    site.store.freeze()
    site.client().delete("unacked")  # what an old kombu may have left there
    with app.connection(own_server.url()) as connection:
        run_late.apply_async((label,), queue=worker.worker_queue, connection=connection)
    wait_until(lambda: site.store.held, "it has asked")
    site.fail(FAULTS["loading"])
    worker.wait_for_log("cannot go back")

    worker.container.kill("SIGTERM")
    if celery.VERSION >= (5, 6):  # before, Celery looks for its broker for half a minute first
        worker.container.wait_for_exit()

    assert "is lost" not in worker.logs()
    assert history.runs(label) == []
    assert site.messages(worker.worker_queue) == 1
