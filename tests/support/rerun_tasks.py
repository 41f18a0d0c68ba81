"""Updates of which only the newest counts; see worker_app."""

from __future__ import annotations

import os
import time

from worker_app import _client, _recorded, _wait_at_gate, by_label

newest = {"on_conflict": "rerun", "acks_late": True, "reject_on_worker_lost": True}


def _effect(label: str) -> str:
    return f"worker_app:update:{label}"


def effect_of(label: str) -> int:
    """The number of the last update whose body came to its end."""
    return int(_client(os.getpid()).get(_effect(label)) or 0)


def _update(self, label, number):
    """Takes effect when its gate is open."""
    with _recorded(self, label):
        _wait_at_gate(label)
        _client(os.getpid()).set(_effect(label), number, ex=600)
    return number


update = by_label(name="rerun_tasks.update", **newest)(_update)
update_too = by_label(name="rerun_tasks.update_too", **newest)(_update)


@by_label(name="rerun_tasks.update_with_retry", **newest)
def update_with_retry(self, label, number):
    """The first one is retried."""
    if number == 1 and not self.request.retries:
        with _recorded(self, label):
            _wait_at_gate(label)
            raise self.retry(countdown=2.0, headers={"mine": 1})
    return _update(self, label, number)


@by_label(name="rerun_tasks.update_soon", lock_ttl=3.0, **newest)
def update_soon(self, label, number):
    """Takes effect after a moment, in which it may be killed."""
    with _recorded(self, label):
        time.sleep(0.2)
        _client(os.getpid()).set(_effect(label), number, ex=600)
    return number
