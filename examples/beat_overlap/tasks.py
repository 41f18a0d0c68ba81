"""A report that takes longer than the time from one firing to the next."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import redis
from celery import Celery, Task, current_task
from celery.signals import after_task_publish, beat_init, task_revoked

from celery_singleton_lock import LockEvent, SingletonTask, lock_refused
from timeline import write_body

from .ways import TAKES

app = Celery("beat_overlap.tasks")
app.config_from_object("beat_overlap.celeryconfig")


@app.task(base=Task)
def report_plain(way: str) -> None:
    """Starts whenever beat says so."""
    write_report(way)


@app.task(base=SingletonTask)
def report(way: str) -> None:
    """Starts when beat says so, unless the one before is still at work: then it is skipped."""
    write_report(way)


def write_report(way: str) -> None:
    """What must not be done twice at the same time."""
    start = time.monotonic()
    time.sleep(TAKES)
    write_body(client(), key("ran", way), current_task.request.hostname, start)


# The rest only counts, for the table and the picture.


@beat_init.connect
def count_in_beat(**_: Any) -> None:
    """In beat alone: a worker that puts a run back into the queue publishes too."""
    after_task_publish.connect(count_fired)


def count_fired(body: Any, **_: Any) -> None:
    """Celery's signal after each publish."""
    _, kwargs, _ = body
    client().rpush(key("fired", kwargs["way"]), time.monotonic())


@lock_refused.connect
def count_skipped(sender: Any, event: LockEvent, **_: Any) -> None:
    """The plugin's signal, sent in the process where the run met the held lock."""
    if event.outcome == "skip":  # other policies send it too, and the run goes on later
        client().rpush(key("skipped", sender.request.kwargs["way"]), event.task_id)


@task_revoked.connect
def count_expired(request: Any, expired: bool, **_: Any) -> None:
    """Celery's signal, sent in the worker's main process, which runs nothing that is too old."""
    if expired:
        client().rpush(key("expired", request.kwargs["way"]), request.id)


def key(kind: str, way: str) -> str:
    """Where is kept what of a way was ``fired``, ``ran``, was ``skipped`` or ``expired``."""
    return f"{app.conf.broker_transport_options['global_keyprefix']}{kind}:{way}"


@cache
def client() -> redis.Redis:
    """The broker's Redis."""
    return redis.Redis.from_url(app.conf.broker_url, decode_responses=True)
