"""Whatever happens to published runs, in whatever order: what is reserved is what should be.

A state machine over publish, start, end, retry, revoke, expiry, crash, redelivery and purge, whose
model says who has the lock and the reservation, and until when; after each step Redis says the
same. What the model leaves open is who goes first of those that stand in line (test_line.py).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from celery import uuid
from celery.worker import state as worker_state
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kombu.exceptions import SerializerNotInstalled

from phase_fleet import (
    LOCK_TTL,
    RESERVATION_TTL,
    TICK,
    Delivery,
    Fleet,
    Run,
    dies,
    dies_once_it_is_stored,
    in_ticks,
)

LIFETIME, QUEUED = "lifetime", "queued_and_running"

#: Of the thorough profile: they take a few minutes.
MOST_EXAMPLES = 1_000

#: In ticks: of anything that a lock leaves behind, but its bucket.
LONGEST_LIFE = 40

countdowns = st.integers(0, 3)
#: Which of those that there are.
any_of_them = st.integers(0, 9)


@dataclass
class Slot:
    """The lock, or the reservation beside it, as the model has it.

    Attributes:
        task_id: Whose it is.
        until: The tick at which it is over unless something is done.
        run: Which execution has it; ``None``: it is kept for one that is to come.
        kept_for: Ticks that it is to be kept once that one gives it back.
    """

    task_id: str
    until: int
    run: Run | None = None
    kept_for: int = 0


class PhaseMachine(RuleBasedStateMachine):
    """One call, and all that becomes of it.

    Args:
        fleet: Where; begun afresh.
    """

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        fleet.start_afresh()
        self.fleet = fleet
        self.is_lifetime = fleet.task.lock_phase == LIFETIME
        self.queue: list[Delivery] = []
        self.runs: list[Run] = []
        #: Not acknowledged, by a worker that is gone.
        self.unacknowledged: list[Delivery] = []
        self.lock: Slot | None = None
        #: Beside the lock; always ``None`` where that is what is reserved.
        self.waiting: Slot | None = None

    # publishing ----------------------------------------------------------------------------------

    @precondition(lambda self: not self._is_covered())
    @rule(countdown=countdowns, expires=st.none() | st.integers(1, 8))
    def publish(self, countdown, expires):
        self._publish(countdown, expires)

    def _publish(self, countdown, expires):
        in_line = self.fleet.is_anybody_in_line()
        is_leaving = self._is_leaving()
        result = self.fleet.publish(
            countdown=countdown * TICK, expires=None if expires is None else expires * TICK
        )
        published = self.fleet.published()
        if self.is_lifetime and in_line and result.is_duplicate:
            # Whoever is due in the line goes before.
            assert self.lock is None
            assert not published
        else:
            assert not result.is_duplicate
            assert [each.task_id for each in published] == [result.id]
            assert published[0].is_reserved is not is_leaving
            self.queue += published
            if not is_leaving:
                life = countdown + RESERVATION_TTL
                self._reserve(result.id, life if expires is None else min(life, expires))

    @rule()
    def publish_what_somebody_waits_for(self):
        """A call that is published whatever is reserved, and meets the lock when it starts."""
        task_id = uuid()
        assert not self.fleet.publish(task_id=task_id).is_duplicate
        [delivery] = self.fleet.published()
        assert delivery.task_id == task_id
        assert not delivery.is_reserved
        self.queue.append(delivery)

    @precondition(lambda self: not self._is_covered() and not self.fleet.is_anybody_in_line())
    @rule()
    def fail_to_publish(self):
        with pytest.raises(SerializerNotInstalled):
            self.fleet.publish(serializer="there is none such")
        assert self.fleet.published() == []

    # starting ------------------------------------------------------------------------------------

    # Three rules: Hypothesis leaves out some at a time, and without a start little happens.

    @precondition(lambda self: self._due())
    @rule(which=any_of_them)
    def start(self, which):
        self._start(self._take(self._due(), which))

    @precondition(lambda self: self._due())
    @rule()
    def start_what_came_last(self):
        self._start(self._take(self._due(), -1))

    @precondition(lambda self: not self._is_covered())
    @rule()
    def publish_and_start(self):
        self._publish(0, None)
        if self._due():
            self._start(self._take(self._due(), -1))

    def _start(self, delivery):
        run = Run(delivery, self.fleet.request(delivery))
        in_line = self.fleet.is_anybody_in_line()
        has_succeeded = self.fleet.has_succeeded(run.task_id)
        has_begun = run.begins()
        published = self.fleet.published()
        if self._is_void(delivery) or (delivery.is_known_as_redelivered and has_succeeded):
            assert not has_begun
            assert not published
            self._cancel(delivery)
        elif has_begun:
            assert self.lock is None or self._is_kept_for(self.lock, run.task_id)
            assert not published
            self._take_lock(run)
        else:
            assert self.lock is not None or in_line
            assert not self._is_kept_for(self.lock, run.task_id)
            self._refused(delivery, published)

    @precondition(lambda self: self._due())
    @rule(which=any_of_them, how=st.sampled_from(["unknown", "terminated", "lost"]))
    def die_before_the_start(self, which, how):
        """Or come to a worker that does not know the task."""
        delivery = self._take(self._due(), which)
        if how == "unknown":
            self.fleet.throw_away(delivery)
        else:
            request = self.fleet.request(delivery)
            is_given_back = self.fleet.tell_of_death(request, is_lost=how == "lost")
            self._come_again(delivery, is_given_back)
        if how != "lost":
            self._cancel(delivery)

    # ending --------------------------------------------------------------------------------------

    @precondition(lambda self: self.runs)
    @rule(which=any_of_them, is_failure=st.booleans())
    def end(self, which, is_failure):
        run = self._any_run(which)
        self._end(run, _fail if is_failure else _return)
        self._give_back(run)

    @precondition(lambda self: self.runs)
    @rule(which=any_of_them, countdown=countdowns, is_thrown=st.booleans())
    def retry(self, which, countdown, is_thrown):
        run = self._any_run(which)

        def order(task):
            task.retry(countdown=countdown * TICK, throw=is_thrown)

        assert run.does(order) is not is_thrown
        published = self.fleet.published()
        assert [each.task_id for each in published] == [run.task_id]
        assert published[0].is_reserved
        self.queue += published
        self._reserve_retry(run, countdown + RESERVATION_TTL)
        if is_thrown:
            self.runs.remove(run)
            self._give_back(run)

    # dying ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.runs)
    @rule(
        which=any_of_them,
        is_stored=st.booleans(),
        how=st.sampled_from(["terminated", "lost", "with its worker"]),
    )
    def die(self, which, is_stored, how):
        run = self._any_run(which)
        self._end(run, dies_once_it_is_stored if is_stored else dies)
        if how == "with its worker":
            self.unacknowledged.append(run.delivery)
            return
        has_succeeded = self.fleet.has_succeeded(run.task_id)
        is_given_back = self.fleet.tell_of_death(run.request, is_lost=how == "lost")
        self._come_again(run.delivery, is_given_back)
        if self._has_lock(run):
            if how == "lost" and self.is_lifetime and not has_succeeded:
                self.lock.kept_for = RESERVATION_TTL
            self._give_back(run)
        elif how == "terminated":
            self._cancel(run.delivery)

    @precondition(lambda self: self.runs)
    @rule(which=any_of_them)
    def stall(self, which):
        """Its process is paused for longer than its ttl, or cannot reach Redis."""
        self._any_run(which).is_renewed = False

    # what the broker does ------------------------------------------------------------------------

    @precondition(lambda self: self.runs or self.unacknowledged)
    @rule(which=any_of_them)
    def redeliver(self, which):
        deliveries = [each.delivery for each in self.runs] + self.unacknowledged
        delivery = deliveries[which % len(deliveries)]
        if delivery in self.unacknowledged:
            self.unacknowledged.remove(delivery)
        self._come_again(delivery, True)

    @precondition(lambda self: self.queue)
    @rule(which=any_of_them, is_purged=st.booleans())
    def lose_or_revoke(self, which, is_purged):
        delivery = self.queue[which % len(self.queue)]
        if is_purged:
            self.queue.remove(delivery)
        else:
            worker_state.revoked.add(delivery.task_id)

    @rule(ticks=st.integers(1, 4))
    def let_time_pass(self, ticks):
        for _ in range(ticks):
            self._pass_tick()

    # what always holds ---------------------------------------------------------------------------

    @invariant()
    def redis_says_the_same(self):
        self._check_slot(self.fleet.lock_key, self.lock)
        if not self.is_lifetime:
            self._check_slot(self.fleet.reserved_key, self.waiting)

    @invariant()
    def what_is_covered_is_not_published(self):
        if self._is_covered():
            self._is_a_duplicate(self.fleet.publish(), self.fleet.published())

    def teardown(self):
        has_failed = sys.exc_info()[0] is not None
        for run in list(self.runs):
            self._end(run, _return)
            self._give_back(run)
        if not has_failed:
            self._check_that_nothing_is_left()

    def _check_that_nothing_is_left(self):
        for delivery in self.queue:
            worker_state.revoked.add(delivery.task_id)
            Run(delivery, self.fleet.request(delivery)).begins()
            self._cancel(delivery)
        self.redis_says_the_same()
        for _ in range(LONGEST_LIFE):
            self._pass_tick()
        left = self.fleet.client.keys()
        assert [key for key in left if not key.endswith(":fencing")] == []

    # the model -----------------------------------------------------------------------------------

    def _is_covered(self):
        slot = self.lock if self.is_lifetime else self.waiting
        return slot is not None and not self._is_leaving()

    def _is_leaving(self):
        """Whether the lock is had by a run whose result is there: then a call counts (R5)."""
        has_begun = self.is_lifetime and self.lock is not None and self.lock.run is not None
        return has_begun and self.fleet.is_finished(self.lock.task_id)

    def _is_a_duplicate(self, result, published):
        slot = self.lock if self.is_lifetime else self.waiting
        assert published == []
        assert result.is_duplicate
        assert result.id == result.holder.task_id == slot.task_id

    def _is_kept_for(self, slot, task_id):
        return slot is not None and slot.run is None and slot.task_id == task_id

    def _has_lock(self, run):
        return self.lock is not None and self.lock.run is run

    def _is_void(self, delivery):
        is_over = delivery.expires_at is not None and delivery.expires_at <= self.fleet.now
        return is_over or delivery.task_id in worker_state.revoked

    def _reserve(self, task_id, ticks):
        slot = Slot(task_id, self.fleet.now + ticks)
        if self.is_lifetime:
            self.lock = slot
        else:
            self.waiting = slot

    def _reserve_retry(self, run, ticks):
        if self.is_lifetime:
            if self._has_lock(run):
                self.lock.kept_for = ticks
        elif self.waiting is None or self.waiting.task_id == run.task_id:
            self._reserve(run.task_id, ticks)

    def _take_lock(self, run):
        self.lock = Slot(run.task_id, self.fleet.now + LOCK_TTL, run)
        self.runs.append(run)
        if run.delivery.is_reserved and self._is_kept_for(self.waiting, run.task_id):
            self.waiting = None

    def _refused(self, delivery, published):
        task_id = delivery.task_id
        is_with_itself = self.lock is not None and self.lock.task_id == task_id
        if self.is_lifetime and not delivery.is_promised and not is_with_itself:
            assert published == []
            assert self.fleet.is_finished(task_id)
            return
        assert [each.task_id for each in published] == [task_id]
        assert published[0].is_reserved is delivery.is_reserved
        self.queue += published
        if delivery.is_reserved and self._is_kept_for(self.waiting, task_id):
            self.waiting.until = self.fleet.now + RESERVATION_TTL

    def _give_back(self, run):
        if not self._has_lock(run):
            return
        kept_for = self.lock.kept_for
        self.lock = Slot(run.task_id, self.fleet.now + kept_for) if kept_for else None

    def _cancel(self, delivery):
        """What was reserved for a message that is thrown away is anyone's."""
        if not delivery.is_reserved:
            return
        if self.is_lifetime and self._is_kept_for(self.lock, delivery.task_id):
            self.lock = None
        if self._is_kept_for(self.waiting, delivery.task_id):
            self.waiting = None

    def _pass_tick(self):
        renewed = [run for run in self.runs if run.is_renewed]
        self.fleet.pass_tick(renewed)
        self.lock, self.waiting = self._unless_over(self.lock), self._unless_over(self.waiting)
        if self.lock is not None and self.lock.run in renewed:
            self.lock.until = self.fleet.now + LOCK_TTL

    def _unless_over(self, slot):
        return slot if slot is not None and slot.until > self.fleet.now else None

    # means ---------------------------------------------------------------------------------------

    def _due(self):
        return [each for each in self.queue if each.due_at <= self.fleet.now]

    def _take(self, deliveries, which):
        delivery = deliveries[which % len(deliveries)]
        self.queue.remove(delivery)
        return delivery

    def _any_run(self, which):
        return self.runs[which % len(self.runs)]

    def _end(self, run, order):
        self.runs.remove(run)
        assert not run.does(order)
        assert self.fleet.published() == []

    def _come_again(self, delivery, is_redelivered):
        if is_redelivered:
            again = Delivery(delivery.message, self.fleet.now, delivery.expires_at, True)
            self.queue.append(again)

    def _check_slot(self, key, slot):
        owner_token, task_id = self.fleet.client.hmget(key, "owner_token", "task_id")
        if slot is None:
            assert task_id is None, f"{key} should be free"
            return
        assert task_id == slot.task_id
        assert owner_token == (slot.run.owner_token if slot.run else "")
        left = (slot.until - self.fleet.now) * TICK
        assert left - TICK / 2 < self.fleet.client.pttl(key) / 1000 <= left


def _return(task):
    return True


def _fail(task):
    raise KeyError("on purpose")


@pytest.fixture(params=[LIFETIME, QUEUED])
def fleet(request, redis_server, monkeypatch):
    in_ticks(monkeypatch)
    fleet = Fleet(redis_server, request.param)
    yield fleet
    fleet.close()


@pytest.mark.parametrize("is_lost", [True, False])
def test_nobody_waits_for_a_copy_of_a_run_that_died_with_its_success_stored(fleet, is_lost):
    fleet.publish()
    [delivery] = fleet.published()
    run = Run(delivery, fleet.request(delivery))
    assert run.begins()
    run.does(dies_once_it_is_stored)

    fleet.tell_of_death(run.request, is_lost=is_lost)

    assert not fleet.publish().is_duplicate


def test_what_is_reserved_is_what_should_be_whatever_happens(fleet):
    run_state_machine_as_test(
        lambda: PhaseMachine(fleet),
        settings=settings(
            max_examples=min(settings().max_examples // 2, MOST_EXAMPLES),
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )
