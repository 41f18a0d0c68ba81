"""R1, R3 and R9 under load, while children and whole workers are killed at random.

The short form runs with all tests, the long one by ``tox run -e kills``.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest
from celery import states

from random_kills import Killer, Load, plan
from timeline import overlaps
from waiting import wait_until
from worker_app import have_effect

KEYS = 12
#: Runs that are published and not done.
BACKLOG = 2 * KEYS
#: Seconds for what is left after the last kill.
LONGEST_REST = 90.0


@pytest.fixture
def load(sender, seed, labels, history):
    def publish(label, seconds):
        return sender.send_task(have_effect.name, (label, seconds)).id

    return Load(seed, labels, publish, history)


@pytest.fixture
def labels(new_label):
    return [new_label() for _ in range(KEYS)]


@pytest.fixture
def killer(kill_settings, launch_worker, broker, load):
    workers = [launch_worker(concurrency=6, **kill_settings) for _ in range(2)]
    for worker in workers:
        worker.ready()
    return Killer(workers, broker, load)


@pytest.fixture
def seed(request):
    return request.config.option.kills_seed


@pytest.fixture
def steps(request, seed):
    """The plan; how to repeat it is shown when the test fails."""
    given = request.config.option
    counts = f"--child-kills={given.child_kills} --worker-kills={given.worker_kills}"
    print(f"To repeat the plan, though not the timing: {counts} --kills-seed={seed}")
    return plan(seed, given.child_kills, given.worker_kills)


def test_one_seed_makes_one_plan():
    steps = plan(7, 8, 2)

    assert steps == plan(7, 8, 2)
    assert steps != plan(8, 8, 2)
    assert Counter(step.target for step in steps) == {"body": 6, "child": 2, "worker": 2}


def test_whatever_is_killed_every_task_is_done_and_no_two_runs_of_a_key_overlap(
    steps, killer, load, broker, labels, held_locks, app
):
    long = 1.3 * have_effect.lock_ttl  # then its lease must have been renewed
    began = time.monotonic()

    # When processes are killed while there is work all the time, and what is left is done
    for number, step in enumerate(steps, 1):
        due = time.monotonic() + step.delay
        while time.monotonic() < due:
            load.top_up(BACKLOG, long)
            killer.supervise()
            time.sleep(0.05)
        killer.carry_out(step)
        print(f"{time.monotonic() - began:6.1f} s: {number} of {len(steps)} kills, {load}")
    wait_until(
        lambda: killer.supervise() or not broker.task_ids(),
        "every message is acknowledged",
        timeout=LONGEST_REST,
    )
    wait_until(
        lambda: not (load.undone() or broker.task_ids()),
        "every task is done, now that no message is left",  # but one that is being delivered
    )
    wait_until(lambda: not held_locks(), "no lock is left", timeout=have_effect.lock_ttl + 1)
    print(f"{time.monotonic() - began:6.1f} s: all done, {load}")

    # Then all succeeded, one at a time
    assert Counter(app.backend.get_state(each) for each in load.task_ids) == {
        states.SUCCESS: len(load.task_ids)
    }
    runs = killer.runs()
    assert [run for run in runs if not run.is_over] == []
    for label in labels:
        ours = [run for run in runs if run.label == label]
        assert overlaps(ours) == 0
        tokens = [run.fencing_token for run in ours]
        assert tokens == sorted(set(tokens))

    # And the test was worth it
    cut_short = [run for run in load.runs() if not run.is_over]
    hits = [kill for kill in killer.kills if any(kill.ended(run) for run in cut_short)]
    in_body = sum(not kill.is_of_worker for kill in hits)
    renewed = sum(run.end - run.start > have_effect.lock_ttl for run in runs)
    print(f"{len(runs)} bodies, {renewed} beyond the ttl; {in_body} children were killed in one")
    assert len(killer.kills) == len(steps)
    assert in_body >= sum(step.target != "worker" for step in steps) / 2
    assert renewed
