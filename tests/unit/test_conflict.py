"""What becomes of a run that meets a held lock: the policies, and R5 above them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from celery_singleton_lock.conflict import (
    LONGEST_DELAY,
    SHORTEST_DELAY,
    Conflict,
    Fail,
    Join,
    Requeue,
    Skip,
    Wait,
    decide,
    policy_name,
    requeue_delay,
)
from celery_singleton_lock.errors import ConfigurationError, Holder

MET = Conflict("shop.buy", "mine", "key", Holder("theirs", "celery@there", 7, 1.0, 1))


def test_a_duplicate_is_skipped_fails_or_goes_back_as_its_policy_says():
    assert decide("skip", MET) == Skip()
    assert isinstance(decide("fail", MET), Fail)
    assert isinstance(decide("requeue", MET), Requeue)


def test_a_callable_sees_the_frozen_conflict_and_names_a_policy():
    seen = []

    assert policy_name(lambda conflict: seen.append(conflict) or "skip", MET) == "skip"
    assert seen == [MET]
    with pytest.raises(FrozenInstanceError):
        MET.task_id = "x"


def test_a_callable_that_names_no_policy_is_told_the_names():
    with pytest.raises(ConfigurationError, match=r"shop\.buy.*'ignore'.*'skip'"):
        policy_name(lambda conflict: "ignore", MET)


@pytest.mark.parametrize("policy", ["skip", "fail"])
@pytest.mark.parametrize(
    "change", [{"retries": 1}, {"is_redelivered": True}, {"requeues": 1}, {"task_id": "theirs"}]
)
def test_who_was_let_in_before_goes_back_to_the_queue_whatever_the_policy(policy, change):
    assert isinstance(decide(policy, replace(MET, **change)), Requeue)


def test_requeue_fails_when_its_wait_timeout_is_over_and_not_before():
    waits = replace(MET, wait_timeout=10.0, requeues=3)

    assert isinstance(decide("requeue", replace(waits, waited=9.9)), Requeue)
    assert decide("requeue", replace(waits, waited=9.9)).countdown <= 0.1 + 1e-9
    assert isinstance(decide("requeue", replace(waits, waited=10.0)), Fail)


@pytest.mark.parametrize("policy", ["requeue", "wait"])
@pytest.mark.parametrize("change", [{"retries": 1}, {"is_redelivered": True}])
def test_a_wait_timeout_is_not_for_runs_that_were_under_way(policy, change):
    late = replace(MET, wait_timeout=10.0, waited=10.0, delay=0.2, **change)

    assert decide(policy, late) == Requeue(0.2)


def test_a_conflict_with_itself_has_no_wait_timeout():
    with_itself = replace(MET, task_id="theirs", wait_timeout=10.0, waited=99.0)

    assert isinstance(decide("requeue", with_itself), Requeue)


def test_runs_without_a_task_id_are_not_taken_for_one_another():
    nobody = replace(MET, task_id="", holder=replace(MET.holder, task_id=""))

    assert decide("skip", nobody) == Skip()


@pytest.mark.parametrize("change", [{}, {"retries": 1}])
def test_an_eager_run_has_no_queue_and_waits_where_it_is(change):
    assert decide("requeue", replace(MET, is_eager=True, **change)) == Wait(60.0)


@pytest.mark.parametrize("change", [{"task_id": "theirs"}, {"is_holder_queued": True}])
def test_an_eager_run_does_not_wait_for_who_cannot_come_before_it(change):
    outcome = decide("requeue", replace(MET, is_eager=True, **change))

    assert isinstance(outcome, Fail)
    assert "no queue" in outcome.reason


def test_wait_stands_in_line_for_what_is_left_of_its_wait_timeout():
    assert decide("wait", MET) == Wait(60.0)
    assert decide("wait", replace(MET, wait_timeout=10.0, waited=4.0)) == Wait(6.0)
    assert isinstance(decide("wait", replace(MET, wait_timeout=10.0, waited=10.0)), Fail)


@pytest.mark.parametrize("change", [{"retries": 1}, {"is_redelivered": True}, {"requeues": 1}])
def test_who_was_let_in_before_waits_in_its_slot_if_that_is_its_policy(change):
    assert decide("wait", replace(MET, **change)) == Wait(60.0)


@pytest.mark.parametrize("change", [{"task_id": "theirs"}, {"is_holder_queued": True}])
def test_nobody_waits_in_a_slot_for_itself_or_for_a_run_in_its_queue(change):
    assert decide("wait", replace(MET, delay=0.2, **change)) == Requeue(0.2)


def test_who_waits_for_a_run_in_its_queue_fails_when_its_wait_timeout_is_over():
    late = replace(MET, is_holder_queued=True, wait_timeout=10.0, waited=10.0)

    assert isinstance(decide("wait", late), Fail)


SAME_CALL = replace(MET, is_same_call=True, delay=0.2)


def test_a_duplicate_joins_a_run_of_the_same_call_and_goes_back_for_any_other_holder():
    assert decide("join", SAME_CALL) == Join(0.2)
    assert decide("join", replace(MET, delay=0.2)) == Requeue(0.2)
    by_hand = replace(SAME_CALL, holder=replace(MET.holder, task_id=""))
    assert decide("join", by_hand) == Requeue(0.2)


@pytest.mark.parametrize("change", [{"retries": 1}, {"is_redelivered": True}, {"requeues": 1}])
def test_who_was_let_in_before_may_join(change):
    assert decide("join", replace(SAME_CALL, **change)) == Join(0.2)


def test_nobody_joins_itself():
    assert decide("join", replace(SAME_CALL, task_id="theirs")) == Requeue(0.2)


def test_who_has_joined_fails_when_its_wait_timeout_is_over_and_not_before():
    waits = replace(SAME_CALL, wait_timeout=10.0, requeues=3)

    assert decide("join", replace(waits, waited=9.9)).countdown <= 0.1 + 1e-9
    assert isinstance(decide("join", replace(waits, waited=10.0)), Fail)
    late = replace(waits, waited=10.0, is_redelivered=True)
    assert decide("join", late) == Requeue(0.2)


def test_an_eager_run_joins_nobody_and_waits_where_it_is():
    assert decide("join", replace(SAME_CALL, is_eager=True)) == Wait(60.0)


def test_delays_grow_are_spread_and_have_an_end():
    firsts = {requeue_delay(0) for _ in range(100)}
    lasts = {requeue_delay(10**6) for _ in range(100)}

    assert len(firsts) > 50
    assert all(SHORTEST_DELAY / 2 <= delay <= SHORTEST_DELAY for delay in firsts)
    assert all(LONGEST_DELAY / 2 <= delay <= LONGEST_DELAY for delay in lasts)
