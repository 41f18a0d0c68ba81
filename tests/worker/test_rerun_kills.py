"""No kill loses the newest update, whatever it hits, and most updates need no run.

The short form runs with all tests, the long one by ``tox run -e reruns``.
"""

from __future__ import annotations

import random
import time
from functools import partial

import pytest

from celery_singleton_lock import SingletonTask
from random_kills import Killer, plan
from rerun_tasks import effect_of, update_soon
from timeline import overlaps
from waiting import wait_until

#: Seconds for what is left after the last kill.
LONGEST_REST = 60.0


class Updates:
    """Updates of one label with rising numbers: in bursts, as users send them.

    Args:
        seed: For the length of the bursts.
        publish: Called with the number of each; returns its result.
        runs: Tells what the bodies wrote down.
    """

    def __init__(self, seed, publish, runs):
        self._chance = random.Random(seed)
        self.published = 0
        self._publish = publish
        self._under_way = []
        self.runs = runs

    def publish_some(self, most):
        """The next few, until so many are published; False once they are."""
        burst = min(self._chance.choice((1, 1, 2, 12)), most - self.published)
        for _ in range(burst):
            self.publish_one()
        return burst > 0

    def publish_one(self):
        """One more: a kill may wait for a run that it can hit."""
        self.published += 1
        self._under_way.append(self._publish(self.published))

    def undone(self):
        """The task ids of those that have no outcome yet."""
        self._under_way = [each for each in self._under_way if not each.ready()]
        return {each.id for each in self._under_way}


@pytest.fixture
def task(sender):
    """The task as its publisher has it."""
    options = {name: getattr(update_soon, name) for name in ("name", "lock_name", "lock_args")}
    options |= {"acks_late": True, "reject_on_worker_lost": True, "on_conflict": "rerun"}

    def body(label, number):
        """Workers run the other one."""

    return sender.task(base=SingletonTask, shared=False, **options)(body)


@pytest.fixture
def workers(kill_settings, launch_worker):
    workers = [launch_worker(concurrency=4, **kill_settings) for _ in range(2)]
    for worker in workers:
        worker.ready()
    return workers


def test_the_newest_update_is_there_whatever_was_killed(
    request, task, workers, broker, history, new_label
):
    given = request.config.option
    for seed in range(given.kills_seed, given.kills_seed + given.rerun_rounds):
        label = new_label()
        updates = Updates(seed, partial(task.delay, label), partial(history.runs, label))
        killer = Killer(workers, broker, updates)
        play(seed, given, updates, killer, broker)

        runs = killer.runs()
        cut_short = [each for each in updates.runs() if not each.is_over]
        hits = sum(any(kill.ended(run) for run in cut_short) for kill in killer.kills)
        print(
            f"seed {seed}: {updates.published} updates, {len(runs)} runs, "
            f"{len(killer.kills)} kills, {hits} of them in a body"
        )
        assert effect_of(label) == updates.published
        assert overlaps(runs) == 0
        assert len(runs) <= updates.published / 4
        assert hits


def play(seed, given, updates, killer, broker):
    """Publish all of them while the plan is carried out, and let what is left be done."""
    of_workers = given.rerun_kills // 5
    steps = plan(seed, given.rerun_kills - of_workers, of_workers)
    for number, step in enumerate(steps, 1):
        due, share = time.monotonic() + step.delay, given.rerun_publishes * number // len(steps)
        while time.monotonic() < due:
            killer.supervise()
            updates.publish_some(share)
            time.sleep(0.05)
        while updates.publish_some(share):
            pass
        killer.carry_out(step, meanwhile=updates.publish_one)
    wait_until(
        lambda: killer.supervise() or not (updates.undone() or broker.task_ids()),
        "every update has run, or was overtaken",
        timeout=LONGEST_REST,
    )
