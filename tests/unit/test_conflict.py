"""What becomes of a run that meets a held lock: the policies, and R5 above them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from celery_singleton_lock.conflict import (
    LONGEST_DELAY,
    SHORTEST_DELAY,
    Conflict,
    Fail,
    Requeue,
    Skip,
    decide,
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

    assert decide(lambda conflict: seen.append(conflict) or "skip", MET) == Skip()
    assert seen == [MET]
    with pytest.raises(FrozenInstanceError):
        MET.task_id = "x"


def test_a_callable_that_names_no_policy_is_told_the_names():
    with pytest.raises(ConfigurationError, match=r"shop\.buy.*'ignore'.*'skip'"):
        decide(lambda conflict: "ignore", MET)


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


def test_a_conflict_with_itself_has_no_wait_timeout():
    with_itself = replace(MET, task_id="theirs", wait_timeout=10.0, waited=99.0)

    assert isinstance(decide("requeue", with_itself), Requeue)


def test_runs_without_a_task_id_are_not_taken_for_one_another():
    nobody = replace(MET, task_id="", holder=replace(MET.holder, task_id=""))

    assert decide("skip", nobody) == Skip()


def test_an_eager_run_has_no_queue_to_go_back_to():
    outcome = decide("requeue", replace(MET, is_eager=True))

    assert isinstance(outcome, Fail)
    assert "no queue" in outcome.reason


def test_delays_grow_are_spread_and_have_an_end():
    firsts = {requeue_delay(0) for _ in range(100)}
    lasts = {requeue_delay(10**6) for _ in range(100)}

    assert len(firsts) > 50
    assert all(SHORTEST_DELAY / 2 <= delay <= SHORTEST_DELAY for delay in firsts)
    assert all(LONGEST_DELAY / 2 <= delay <= LONGEST_DELAY for delay in lasts)
