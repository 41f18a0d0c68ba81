"""R6 for every place where a duplicate can stand: nobody waits for ever, and all see how it ends.

The table is ``tests/support/conflicts.py``. Whoever sent the canvas asks for its result, and
somebody who only knows the ids asks for that of each part: all are told, no body and no errback
runs twice, and none runs that should not.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from uuid import uuid4

import pytest
from celery import chain, chord, group, states
from celery.exceptions import ChordError, TaskRevokedError

from celery_singleton_lock import LockHeldError
from conflict_tasks import DUPLICATES, SHARED, failing_step, hold, step
from conflicts import HOLDERS_ENDS, JOIN, NOT_STORED, PLACES, POLICIES, End, Outcome
from waiting import DEADLINE, wait_until
from worker_app import note_error, open_gate


class Parts(dict):
    """The names in a canvas; each part is made when it is met."""

    def __init__(self, new_duplicate, label, queue):
        super().__init__(chain=chain, chord=chord, group=group, errback=note_error.s(label))
        self.ids = {}
        self._new_duplicate, self._label, self._queue = new_duplicate, label, queue

    def __missing__(self, part):
        if part.startswith("duplicate"):
            signature = self._new_duplicate(part)
        else:
            task = failing_step if part == "failing" else step
            signature = task.si(self._label, part)
        self.ids[part] = str(uuid4())
        return signature.set(task_id=self.ids[part], queue=self._queue)


class Scene:
    """A run that has the lock, and a canvas in which a duplicate of it stands."""

    def __init__(self, app, stranger, worker, log, broker, history, label):
        self._app, self._stranger = app, stranger
        self._worker, self._log, self._broker = worker, log, broker
        self._history, self._label = history, label

    def hold(self, is_to_fail=False):
        """Have the lock taken."""
        self._hold(hold.si(self._label, is_to_fail))

    def hold_and_share(self, place, is_to_fail):
        """Have the lock taken by the very call that its duplicates are."""
        self._shared = SHARED[place.is_tracked].si(self._label, "duplicate", is_to_fail)
        self._hold(self._shared.clone())

    def _hold(self, signature):
        self.holder = signature.apply_async(queue=self._worker.worker_queue)
        (self._run,) = self._history.wait_for_starts(self._label)

    def send(self, place, policy, said):
        """Publish the canvas."""
        name = "callable" if said == "by a callable" else policy.name
        duplicate = DUPLICATES[name, place.is_tracked]
        self._send(place, lambda part: duplicate.si(self._label, part, policy.name))

    def send_shared(self, place):
        """Publish the canvas; its duplicates are one call."""
        self._send(place, lambda _: self._shared.clone())

    def _send(self, place, new_duplicate):
        parts = Parts(new_duplicate, self._label, self._worker.worker_queue)
        self._result = eval(place.canvas, {}, parts).apply_async(queue=self._worker.worker_queue)
        self._ids = parts.ids

    def wait_for_conflict(self, place, policy):
        """Until all duplicates have met the lock."""
        for part in place.duplicates:
            text = f"[{self._ids[part]}] {policy.did}"
            wait_until(lambda text=text: text in self._log(), f"the log has {text}")

    def has_ended(self, part):
        """Whether its result says so."""
        return self._app.backend.get_state(self._ids[part]) in states.READY_STATES

    def end_holder(self, how):
        how.make(self._run.pid, self.open_gate)

    def open_gate(self):
        open_gate(self._label)

    def ends(self, expected):
        """What all parts have come to, once they and the whole have come to an end."""
        for part in [part for part, end in expected.items() if end != NOT_STORED]:
            wait_until(lambda part=part: self.has_ended(part), f"{part} has come to an end")
        with suppress(LockHeldError, ChordError, KeyError, TaskRevokedError):
            self._result.get(timeout=DEADLINE)
        return {part: self._end(part, end) for part, end in expected.items()}

    def settle(self, expected):
        """The outcome, when there is nothing left that could change it."""
        wait_until(lambda: all(map(self._is_idle, range(3))), "the worker has done all")
        parts = {task_id: part for part, task_id in self._ids.items()}
        bodies, errbacks = Counter(), Counter()
        for run in self._history.runs(self._label):
            if run.task_id in parts:
                counter = errbacks if run.task_name == note_error.name else bodies
                counter[parts[run.task_id]] += 1
        return Outcome(self.ends(expected), bodies, errbacks)

    def _end(self, part, right):
        # In an app of its own, and when it is there: before Celery 5.7 the end of one result
        # object makes others of the same id deaf.
        result = self._stranger.AsyncResult(self._ids[part])
        answer = None if right == NOT_STORED else result.get(timeout=DEADLINE, propagate=False)
        if isinstance(answer, LockHeldError):
            assert answer.holder.task_id == self.holder.id
        is_error = isinstance(answer, Exception)
        seen = End(result.state, type(answer).__name__ if is_error else answer)
        return right if right.allows(seen) else seen

    def _is_idle(self, _):
        # Between the two looks a run may end that has just published another one: look again.
        return not self._messages() and not self._active()

    def _messages(self):
        """How many the broker has of its queue, delivered ones that nobody acknowledged too."""
        queue = self._worker.worker_queue
        with self._broker.client() as client:
            unacknowledged = map(json.loads, client.hvals("unacked"))
            return client.llen(queue) + sum(message[2] == queue for message in unacknowledged)

    def _active(self):
        host = self._worker.hostname()
        return (self._app.control.inspect([host], limit=1, timeout=10).active() or {}).get(host)


@pytest.fixture
def scene(app, new_app, worker, new_log, redis_server, history, label):
    return Scene(app, new_app(), worker, new_log(worker), redis_server, history, label)


def named(values):
    return [pytest.param(value, id=value.name.replace("`", "")) for value in values]


def steady_places():
    for place in PLACES:
        mark = pytest.mark.skipif(
            not place.is_steady,
            reason=f"before {place.steady_since} some canvases of this form never end",
        )
        yield pytest.param(place, id=place.name.replace("`", ""), marks=mark)


@pytest.mark.parametrize("said", ["by its name", "by a callable"])
@pytest.mark.parametrize("policy", named(each for each in POLICIES if each.end))
@pytest.mark.parametrize("place", named(PLACES))
def test_all_are_told_at_once_of_a_duplicate_that_does_not_run(scene, place, policy, said):
    expected = place.outcome(policy)
    scene.hold()

    scene.send(place, policy, said)

    assert scene.ends(expected.ends) == expected.ends
    assert not scene.holder.ready(), "the lock was held all the time"
    scene.open_gate()
    assert scene.settle(expected.ends) == expected


@pytest.mark.parametrize(
    ("said", "holders_end"),
    [
        *(pytest.param("by its name", each, id=f"holder {each.name}") for each in HOLDERS_ENDS),
        pytest.param("by a callable", HOLDERS_ENDS[0], id="by a callable"),
    ],
)
@pytest.mark.parametrize("policy", named(each for each in POLICIES if not each.end))
@pytest.mark.parametrize("place", list(steady_places()))
def test_a_duplicate_that_waits_runs_once_however_the_holder_ends(
    scene, place, policy, said, holders_end
):
    expected = place.outcome(policy)
    scene.hold(holders_end.is_failure)
    scene.send(place, policy, said)
    scene.wait_for_conflict(place, policy)
    assert not any(scene.has_ended(part) for part in place.duplicates)

    scene.end_holder(holders_end)

    assert scene.ends(expected.ends) == expected.ends
    assert scene.settle(expected.ends) == expected


@pytest.mark.parametrize("holders_end", named(HOLDERS_ENDS))
@pytest.mark.parametrize("place", list(steady_places()))
def test_duplicates_that_join_end_as_the_holder_does_or_one_runs_for_all(scene, place, holders_end):
    expected = place.joined_outcome(holders_end)
    scene.hold_and_share(place, holders_end.is_failure)
    scene.send_shared(place)
    scene.wait_for_conflict(place, JOIN)
    assert not any(scene.has_ended(part) for part in place.duplicates)

    scene.end_holder(holders_end)
    scene.open_gate()

    assert scene.ends(expected.ends) == expected.ends
    outcome = scene.settle(expected.ends)
    ran = [part for part in outcome.bodies.elements() if part.startswith("duplicate")]
    bodies = outcome.bodies - Counter(ran) + Counter({"duplicate": len(ran)})
    assert outcome._replace(bodies=bodies) == expected
