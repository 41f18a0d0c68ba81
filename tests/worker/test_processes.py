"""One app has one store, one process its own connections; a worker that cannot lock stays out."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery import Celery

import worker_app
from celery_singleton_lock import DuplicateTaskError, SingletonTask
from servers import redis_or_skip
from wiretap import wiretap
from worker_app import hold, open_gate, run

#: In URLs that lead nowhere, or to a server that wants another one.
PASSWORD = "s3cr3t-pw"
RIGHT_PASSWORD = "r1ght-pw"
#: Where no server can be: the port is reserved.
NOWHERE = "127.0.0.1:1"


def app_at(url):
    """An app with a task that runs what it is given; its name is the same in each app."""
    app = Celery("twin", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.singleton_store_url = url

    options = {"lock_args": (), "on_conflict": "skip", "shared": False}

    @app.task(base=SingletonTask, name="worker_app.twin", **options)
    def twin(body):
        return body()

    return app


def is_refused_by(one, other):
    """Whether a run of ``other`` finds the lock held while one of ``one`` goes on."""

    def run_other():
        # In a thread of its own: in one and the same execution the lock is re-entrant.
        with ThreadPoolExecutor(1) as thread:
            task = other.tasks["worker_app.twin"]
            return thread.submit(task.apply, (lambda: "ran",)).result().result

    answer = one.tasks["worker_app.twin"].apply((run_other,), throw=True).get()
    assert answer == "ran" or isinstance(answer, DuplicateTaskError)
    return answer != "ran"


def test_apps_with_stores_in_memory_share_no_lock():
    one, other = app_at("memory://"), app_at("memory://")

    assert is_refused_by(one, one)
    assert not is_refused_by(one, other)


def test_apps_share_locks_exactly_when_their_redis_database_is_the_same(private_server):
    one, twin = app_at(private_server.url(0)), app_at(private_server.url(0))
    other = app_at(private_server.url(1))

    assert is_refused_by(one, twin)
    assert not is_refused_by(one, other)


def lock_commands(tap, key_part):
    """The commands on locks whose key contains ``key_part``."""
    return [
        command
        for command in tap.commands
        if command.words[0] == "EVALSHA" and key_part in command.words[3]
    ]


def test_a_forked_child_shares_neither_connections_nor_renewal_with_its_parent(private_server):
    program = Path(worker_app.__file__).with_name("forked_child.py")

    with wiretap(private_server) as tap:
        subprocess.run([sys.executable, program, private_server.url()], check=True, timeout=30)

    by_parent, by_child = lock_commands(tap, "worker_app.parent"), lock_commands(tap, "app.child")
    # one to take it, one to give it back, the rest renewals
    assert len(by_parent) >= 4
    assert len(by_child) >= 4
    assert {each.port for each in by_parent}.isdisjoint(each.port for each in by_child)


@pytest.mark.parametrize("whose", ["task", "by_hand"])
def test_a_forked_child_that_unwinds_leaves_its_parents_lock_alone(private_server, whose):
    program = Path(worker_app.__file__).with_name("forked_exit.py")

    done = subprocess.run([sys.executable, str(program), private_server.url(), whose], timeout=20)

    assert done.returncode == 0


def test_each_process_of_a_prefork_worker_has_connections_of_its_own(
    launch_worker, private_server, history, new_label
):
    labels = [new_label() for _ in range(3)]
    with wiretap(private_server) as tap:
        worker = launch_worker(concurrency=3, singleton_store_url=private_server.url())
        for label in labels:
            hold.apply_async((label,), queue=worker.worker_queue)
        runs = history.wait_for_starts(*labels, count=3)
        open_gate(*labels)
        history.wait_for_ends(*labels, count=3)

    pids_by_port = defaultdict(set)
    for command in lock_commands(tap, "worker_app.label"):
        if command.words[2] == "5":  # acquire has five keys; its process id is the fifth argument
            pids_by_port[command.port].add(int(command.words[12]))
    ports_of_main = {each.port for each in lock_commands(tap, ":check:")}
    assert len(ports_of_main) == 1
    assert set.union(*pids_by_port.values()) == {each.pid for each in runs}
    assert [len(pids) for pids in pids_by_port.values()] == [1, 1, 1]
    assert ports_of_main.isdisjoint(pids_by_port)


def refusal(worker):
    """What a worker that does not start says about it."""
    assert worker.container.wait_for_exit() != 0
    output = worker.logs()
    assert "Traceback" not in output
    assert "ready." not in output
    assert PASSWORD not in output
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    return line


def test_a_store_in_memory_is_refused_by_a_pool_of_several_processes(launch_worker):
    worker = launch_worker(pool="prefork", singleton_store_url="memory://")

    line = refusal(worker)

    assert "memory://" in line
    assert "singleton_store_url" in line


def test_a_store_in_memory_will_do_for_a_pool_of_threads(start_worker, label):
    worker = start_worker(pool="threads", singleton_store_url="memory://")

    assert run.apply_async((label,), queue=worker.worker_queue).get(timeout=10) == label
    assert "Singleton locks live in memory:// (from singleton_store_url)" in worker.logs()


@pytest.fixture(scope="module")
def locked_server():
    """A Redis that wants ``RIGHT_PASSWORD``."""
    with redis_or_skip() as server:
        server.client().config_set("requirepass", RIGHT_PASSWORD)
        yield server


@pytest.mark.parametrize(
    "url",
    [
        f"redis://{NOWHERE}/0",
        f"redis://:{PASSWORD}@{NOWHERE}/0",
        f"redis://:{PASSWORD}@127.0.0.1:no-number/0",
        f"redis://:{PASSWORD}@127.0.0.1:1/no-number",
        f"redis://:{PASSWORD}@127.0.0.1:1/0?socket_timeout=no-number",
        f"redis://user:{PASSWORD}/@127.0.0.1:1/0",
        f"rediss://:{PASSWORD}@{NOWHERE}/0",
        f"unix://:{PASSWORD}@/nowhere/redis.sock?db=1",
        f"amqp://guest:{PASSWORD}@{NOWHERE}//",
        "redis://{locked}/0",
        f"redis://:{PASSWORD}@{{locked}}/0",
        f"redis://user:{PASSWORD}@{{locked}}/0",
    ],
)
def test_a_worker_without_a_usable_store_refuses_to_start_and_tells_no_password(
    launch_worker, locked_server, url
):
    url = url.replace("{locked}", f"127.0.0.1:{locked_server.port}")
    worker = launch_worker(pool="solo", singleton_store_url=url)

    line = refusal(worker)

    assert "singleton_store_url" in line


@pytest.mark.parametrize("setting", ["result_backend", "broker_url"])
def test_a_worker_that_cannot_reach_the_redis_it_would_lock_in_names_the_setting(
    launch_worker, setting
):
    url = f"redis://:{PASSWORD}@{NOWHERE}/0"
    elsewhere = {"broker_url": "memory://", "result_backend": "cache+memory://"}
    worker = launch_worker(pool="solo", singleton_store_url=None, **{**elsewhere, setting: url})

    line = refusal(worker)

    assert setting in line


def test_a_worker_that_starts_tells_no_password(start_worker, locked_server, label):
    url = f"redis://:{RIGHT_PASSWORD}@127.0.0.1:{locked_server.port}/0"

    worker = start_worker(pool="solo", singleton_store_url=url)

    assert run.apply_async((label,), queue=worker.worker_queue).get(timeout=10) == label
    assert f"redis://127.0.0.1:{locked_server.port}/0" in worker.logs()
    assert RIGHT_PASSWORD not in worker.logs()


def test_a_worker_whose_locks_are_switched_off_needs_no_store_and_runs_copies_side_by_side(
    start_worker, history, label
):
    worker = start_worker(
        pool="threads", singleton_enabled=False, singleton_store_url=f"redis://{NOWHERE}"
    )

    copies = [hold.apply_async((label,), queue=worker.worker_queue) for _ in range(2)]
    history.wait_for_starts(label, count=2)
    open_gate(label)

    assert [copy.get(timeout=10) for copy in copies] == [label, label]
    assert "singleton_enabled is False" in worker.logs()


def test_a_worker_says_what_will_bite(start_worker):
    worker = start_worker(pool="prefork")

    assert "WARNING/MainProcess] No time limit ends conflict_tasks.duplicate_call" in worker.logs()


def test_a_worker_says_nothing_where_nothing_will_bite(start_worker):
    worker = start_worker(pool="prefork", task_time_limit=600)

    assert "time limit" not in worker.logs()
    assert "visibility_timeout" not in worker.logs()
