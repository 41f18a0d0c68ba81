"""What is kept for a run before it starts: the same on every store."""

from __future__ import annotations

import pytest

from celery_singleton_lock.stores.base import Claimant, Place, Reserved

KEY = "singleton:{7}:1:report:42"
QUEUED = "singleton:{7}:queued:1:report:42"
FIRST = Claimant("first", "publisher", 11, "c1")
SECOND = Claimant("second", "celery@there", 22, "c2")
TTL = 0.3
LONG = 60.0


def test_a_free_lock_is_reserved_and_tells_for_whom(store):
    answer = store.reserve(KEY, FIRST, LONG)

    assert answer.is_reserved
    assert answer.holder == store.holder(KEY)
    assert (answer.holder.task_id, answer.holder.worker) == ("first", "publisher")
    assert answer.holder.fencing_token == 0


def test_what_is_reserved_is_refused_to_others_with_whose_it_is(store):
    first = store.reserve(KEY, FIRST, LONG)

    refused = store.reserve(KEY, SECOND, LONG)
    met = store.acquire(KEY, "b", LONG, SECOND)

    assert not refused.is_reserved
    assert refused.holder == met.holder == first.holder
    assert not refused.is_running
    assert not met.is_acquired
    assert met.is_holder_queued


@pytest.mark.parametrize(("call", "is_same"), [("c1", True), ("c2", False), ("", False)])
def test_it_tells_whether_it_is_the_same_call(store, call, is_same):
    store.reserve(KEY, FIRST, LONG)

    assert store.reserve(KEY, SECOND._replace(call=call), LONG).is_same_call is is_same
    store.acquire(KEY, "a", LONG, FIRST)
    assert store.reserve(KEY, SECOND._replace(call=call), LONG).is_same_call is is_same


def test_who_does_not_tell_its_call_is_the_same_as_nobody(store):
    store.reserve(KEY, FIRST._replace(call=""), LONG)

    assert not store.reserve(KEY, SECOND._replace(call=""), LONG).is_same_call


def test_whose_it_is_takes_it_once_and_of_two_copies_the_first_wins(store, let_time_pass):
    reserved = store.reserve(KEY, FIRST, LONG)
    let_time_pass(TTL)

    copy = store.acquire(KEY, "a", LONG, FIRST)
    other_copy = store.acquire(KEY, "b", LONG, FIRST)

    assert copy.is_acquired
    assert not other_copy.is_acquired
    # It has been held since its start, not since its publish.
    assert copy.holder.since > reserved.holder.since
    assert store.reserve(KEY, SECOND, LONG).is_running
    store.release(KEY, "a")
    assert store.holder(KEY) is None


def test_a_held_lock_is_not_reserved_not_even_for_its_own_task_id(store):
    store.acquire(KEY, "a", LONG, FIRST)

    assert not store.reserve(KEY, FIRST, LONG).is_reserved
    assert store.renew(KEY, "a", LONG)


def test_asking_again_reserves_for_the_full_time_again(store, let_time_pass):
    first = store.reserve(KEY, FIRST, TTL)
    let_time_pass(TTL * 0.6)

    again = store.reserve(KEY, FIRST, TTL)
    let_time_pass(TTL * 0.6)

    assert again.is_reserved
    assert store.holder(KEY) == again.holder == first.holder


def test_a_reservation_ends_by_itself(store, let_time_pass):
    store.reserve(KEY, FIRST, TTL)

    let_time_pass(TTL * 1.2)

    assert store.holder(KEY) is None
    assert store.reserve(KEY, SECOND, LONG).is_reserved


def test_a_reservation_that_is_cancelled_is_anyones(store):
    store.reserve(KEY, FIRST, LONG)

    assert not store.cancel(KEY, "second")
    assert store.cancel(KEY, "first")

    assert not store.cancel(KEY, "first")
    assert store.reserve(KEY, SECOND, LONG).is_reserved


def test_what_runs_by_now_is_not_cancelled(store):
    store.reserve(KEY, FIRST, LONG)
    store.acquire(KEY, "a", LONG, FIRST)

    assert not store.cancel(KEY, "first")

    assert store.renew(KEY, "a", LONG)


def test_what_is_kept_for_a_retry_can_be_cancelled(store):
    store.acquire(KEY, "a", LONG, FIRST)
    store.hold(KEY, "a", LONG)
    store.release(KEY, "a")

    assert store.cancel(KEY, "first")

    assert store.holder(KEY) is None


def test_a_cancelled_retry_leaves_the_time_that_the_lock_is_kept_at_least(store, let_time_pass):
    store.acquire(KEY, "a", LONG, FIRST)
    store.hold(KEY, "a", LONG)
    store.release(KEY, "a", at_least_for=TTL * 4)

    assert store.cancel(KEY, "first", at_least_for=TTL * 4)

    met = store.acquire(KEY, "b", LONG, SECOND)
    assert not met.is_acquired
    assert not met.is_holder_queued, "nobody comes again"
    let_time_pass(TTL * 4.1)
    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired


def test_a_cancelled_reservation_is_not_kept_although_the_lock_would_be(store):
    store.reserve(KEY, FIRST, LONG)

    store.cancel(KEY, "first", at_least_for=LONG)

    assert store.holder(KEY) is None


def test_what_is_cancelled_goes_to_the_first_in_line(store):
    store.reserve(KEY, FIRST, LONG)
    store.acquire(KEY, "b", LONG, SECOND, Place())

    store.cancel(KEY, "first")

    assert store.holder(KEY).task_id == "second"
    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired


def test_who_stands_in_line_goes_before_a_reservation(store, let_time_pass):
    # Given one who waits, while the lock ran out
    store.acquire(KEY, "a", TTL, FIRST)
    store.acquire(KEY, "b", LONG, SECOND, Place())
    let_time_pass(TTL * 1.2)

    answer = store.reserve(KEY, Claimant("third", "publisher", 1, "c2"), LONG)

    assert not answer.is_reserved
    assert answer.holder.task_id == "second"
    assert answer.is_same_call
    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired


def test_who_is_due_in_its_queue_goes_before_a_reservation(store, let_time_pass):
    store.acquire(KEY, "a", TTL, FIRST)
    store.acquire(KEY, "b", LONG, SECOND, Place(due_in=TTL))
    let_time_pass(TTL * 1.2)

    answer = store.reserve(KEY, FIRST, LONG)

    assert not answer.is_reserved
    assert answer.holder.task_id == "second"
    assert not answer.is_running


def test_a_reservation_passes_one_that_is_not_due_and_is_counted(store):
    store.acquire(KEY, "a", LONG, FIRST)
    place = store.acquire(KEY, "b", LONG, SECOND, Place(due_in=LONG / 2)).place
    store.release(KEY, "a")

    assert store.reserve(KEY, FIRST, LONG).is_reserved

    assert store.acquire(KEY, "b", LONG, SECOND, place).seen == 1


def test_what_was_reserved_beside_the_lock_is_given_back_with_taking_it(store):
    store.reserve(QUEUED, FIRST, LONG)

    assert store.acquire(KEY, "a", LONG, FIRST, reserved=Reserved(QUEUED, LONG)).is_acquired

    assert store.holder(QUEUED) is None
    assert store.holder(KEY).task_id == "first"


def test_what_is_held_by_now_is_not_taken_for_reserved(store):
    store.acquire(QUEUED, "other", LONG, FIRST)

    assert store.acquire(KEY, "a", LONG, FIRST, reserved=Reserved(QUEUED, TTL)).is_acquired

    assert store.renew(QUEUED, "other", LONG)


def test_what_somebody_else_reserved_beside_the_lock_stays(store):
    store.reserve(QUEUED, SECOND, LONG)

    store.acquire(KEY, "a", LONG, FIRST, reserved=Reserved(QUEUED, LONG))

    assert store.holder(QUEUED).task_id == "second"


def test_what_was_reserved_beside_the_lock_is_kept_while_that_is_held(store, let_time_pass):
    store.acquire(KEY, "b", LONG, SECOND)
    store.reserve(QUEUED, FIRST, TTL)
    let_time_pass(TTL * 0.6)

    assert not store.acquire(KEY, "a", LONG, FIRST, reserved=Reserved(QUEUED, TTL)).is_acquired
    let_time_pass(TTL * 0.6)

    assert store.holder(QUEUED).task_id == "first"
    let_time_pass(TTL)
    assert store.holder(QUEUED) is None


def test_what_was_reserved_is_not_made_anew_once_it_is_over(store, let_time_pass):
    store.acquire(KEY, "b", LONG, SECOND)

    store.acquire(KEY, "a", LONG, FIRST, reserved=Reserved(QUEUED, TTL))

    assert store.holder(QUEUED) is None
