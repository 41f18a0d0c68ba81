"""SingletonTask on a worker, with tasks that are made in every other way there is.

They are in ``mixing_app``, and sent by name. What needs no worker is in tests/unit/test_mixing.py.
"""

from __future__ import annotations

import celery
import pytest
from celery import Celery, chord
from celery.canvas import chunks, xmap, xstarmap

from celery_singleton_lock import DuplicateTaskError, LockHeldError
from timeline import overlaps
from wiretap import wiretap
from worker_app import open_gate

#: In seconds; shorter than the default one.
TTL = 25.0


@pytest.fixture(scope="module")
def mixing_worker(launch):
    annotations = {
        "*": {"lock_ttl": TTL},
        "worker_app.annotated": {"lock_args": ["label"], "on_conflict": "fail"},
    }
    return launch(
        name="mixing",
        pool="threads",
        concurrency=8,
        app_module="mixing_app",
        include=None,
        task_annotations=annotations,
    )


@pytest.fixture
def worker(mixing_worker, new_log):
    new_log(mixing_worker)
    return mixing_worker


@pytest.fixture
def call(app, worker):
    """A call of a task of ``mixing_app``, to be sent: ``call(name, *args)``."""

    def call(name, *args):
        return app.signature(f"worker_app.{name}", args, immutable=True, queue=worker.worker_queue)

    return call


@pytest.fixture
def send(call):
    """Sends one: ``send(name, *args)``."""
    return lambda name, *args: call(name, *args).apply_async()


WAYS = [
    "bound",
    "unbound",
    "shared",
    "ClassBased",
    "flask_last",
    "flask_first",
    "prepared_last",
    "prepared_first",
    "own_request",
    "django",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_duplicate_is_skipped_in_whatever_way_its_task_is_made(
    send, history, held_locks, label, way
):
    holder = send(way, label)
    (run,) = history.wait_for_starts(label)

    skipped = send(way, label)

    with pytest.raises(DuplicateTaskError) as caught:
        skipped.get(timeout=10)
    assert caught.value.holder.task_id == holder.id
    assert any(f":worker_app.{way}:" in lock for lock in held_locks())
    assert run.fencing_token > 0
    open_gate(label)
    assert holder.get(timeout=10) == label
    assert [each.task_id for each in history.runs(label)] == [holder.id]


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="Celery has pydantic tasks from 5.5 on")
def test_a_pydantic_task_is_skipped_for_data_that_makes_the_same_call(send, history, label):
    holder = send("pydantic", {"sku": label, "quantity": 1})
    history.wait_for_starts(label)

    skipped = send("pydantic", {"quantity": 1, "sku": label})

    with pytest.raises(DuplicateTaskError) as caught:
        skipped.get(timeout=10)
    assert caught.value.holder.task_id == holder.id


def test_a_task_that_is_published_on_commit_has_its_lock(send, history, label):
    assert send("publish_on_commit", label).get(timeout=10) is True
    (run,) = history.wait_for_starts(label)

    skipped = send("django", label)

    with pytest.raises(DuplicateTaskError) as caught:
        skipped.get(timeout=10)
    assert caught.value.holder.task_id == run.task_id


def test_annotations_say_what_the_lock_of_a_task_is(send, history, held_locks, lock_server, label):
    send("annotated", label, 1)
    history.wait_for_starts(label)

    failed = send("annotated", label, 2)

    with pytest.raises(LockHeldError) as caught:
        failed.get(timeout=10)
    assert not isinstance(caught.value, DuplicateTaskError)
    with lock_server.client() as client:
        (lock,) = (each for each in held_locks() if ":worker_app.annotated:" in each)
        assert client.pttl(lock) <= TTL * 1000


def test_runs_that_celery_retries_by_itself_overlap_with_no_other(send, history, label):
    results = [send("fail_twice", label, number) for number in range(5)]

    assert [each.get(timeout=60) for each in results] == list(range(5))
    runs = history.wait_for_ends(label, count=15)
    assert overlaps(runs) == 0
    assert len({each.fencing_token for each in runs} - {0}) == 15
    for result in results:
        assert [each.retries for each in runs if each.task_id == result.id] == [0, 1, 2]


def test_calls_that_no_worker_sees_take_no_lock(app, worker, call, send, history, label):
    # Given a lock that keeps runs of the task away
    send("bound", label)
    history.wait_for_starts(label)
    with pytest.raises(DuplicateTaskError):
        send("tell_token", label).get(timeout=10)

    # Then a call in another body is not kept away, nor are those that Celery's own tasks make
    assert send("call_directly", label).get(timeout=10) == 0
    task = call("tell_token")
    for calls, answer in [
        (xmap(task, [label], app=app), [0]),
        (xstarmap(task, [(label,)], app=app), [0]),
        (chunks(task, [(label,)], 1, app=app), [[0]]),
    ]:
        assert calls.apply_async(queue=worker.worker_queue).get(timeout=10) == answer


@pytest.fixture(params=["redis", "file"])
def sender_and_worker(request, settings, start_worker, tmp_path):
    """With results in files, a task of Celery's own looks whether a chord's header is over."""
    if request.param == "redis":
        yield request.getfixturevalue("app"), request.getfixturevalue("worker")
        return
    own = {"result_backend": f"file://{tmp_path}", "include": None}
    worker = start_worker(pool="threads", concurrency=4, app_module="mixing_app", **own)
    with Celery("sender", set_as_current=False, changes={**settings, **own}) as sender:
        yield sender, worker


def test_a_chord_of_tasks_that_all_lock_completes_and_celerys_own_take_no_lock(
    sender_and_worker, lock_server, new_label
):
    sender, worker = sender_and_worker
    labels = [new_label(), new_label()]
    open_gate(*labels)
    header, body = (
        sender.signature(f"worker_app.{name}", queue=worker.worker_queue)
        for name in ("bound", "collect")
    )

    with wiretap(lock_server) as tap:
        result = chord([header.clone((label,)) for label in labels], body, app=sender)()
        assert result.get(timeout=20) == labels

    names = [words[3].split(":")[-2] for _, words in tap.commands if words[0] == "EVALSHA"]
    assert "worker_app.bound" in names
    assert [each for each in names if each.startswith("celery.")] == []
