"""Updates of which only the newest counts ("rerun"): the same on every store."""

from __future__ import annotations

import pytest

from celery_singleton_lock.stores.base import FOLLOW_UP_FOR, Claimant, Generation, Place

KEY = "singleton:{7}:1:report:42"
LONG = 60.0
TTL = 0.3


@pytest.fixture
def ask(store, let_time_pass):
    """Ask for the lock with an update of a task: of its number, under the id ``run-<number>``."""

    def ask(number, task="shop.index", token=None, run=None):
        let_time_pass(0.001)
        claimant = Claimant(run or f"run-{number}", "celery@here", 1)
        return store.acquire(
            KEY, token or f"token-{number}", LONG, claimant, generation=Generation(task, number)
        )

    return ask


def test_the_newest_that_was_refused_has_the_lock_kept_for_it(store, ask):
    assert ask(1).is_acquired
    for number in (2, 3):
        assert ask(number).is_newest

    store.release(KEY, "token-1")

    assert store.holder(KEY).task_id == "run-3"
    other = store.acquire(KEY, "other", LONG, Claimant("other", "celery@here", 1))
    assert not other.is_acquired
    assert other.is_holder_queued
    assert ask(3).is_acquired


def test_who_is_not_the_newest_hears_it(store, ask):
    ask(1)
    assert ask(3).is_newest

    older = ask(2)

    assert not older.is_acquired
    assert not older.is_newest
    assert not older.is_superseded
    store.release(KEY, "token-1")
    assert not ask(2).is_acquired
    assert not ask(2).is_newest
    assert ask(3).is_acquired


def test_the_newest_stays_it_however_often_it_asks(ask):
    ask(1)

    assert [ask(2).is_newest for _ in range(3)] == [True] * 3


def test_of_two_with_one_number_the_later_to_arrive_is_the_newer(store, ask):
    ask(1)
    assert ask(2, token="a", run="a").is_newest
    assert ask(2, token="b", run="b").is_newest

    store.release(KEY, "token-1")

    assert store.holder(KEY).task_id == "b"


def test_who_tells_no_number_is_numbered_by_arrival(store, ask):
    first = ask(0, token="a", run="a")
    second, third = ask(0, token="b", run="b"), ask(0, token="c", run="c")

    assert first.is_acquired
    assert first.generation < second.generation < third.generation
    assert third.is_newest
    assert not ask(second.generation, token="b", run="b").is_newest


def test_an_update_older_than_one_that_has_run_is_superseded(store, ask):
    newer = ask(5)
    store.release(KEY, "token-5")

    older = ask(4)

    assert older.is_superseded
    assert not older.is_acquired
    assert older.holder == newer.holder
    assert ask(5, token="again").is_acquired, "a second copy of the newest is not older"


def test_an_update_older_than_the_one_that_runs_is_superseded(ask):
    ask(5)

    assert ask(4).is_superseded


def test_a_newer_one_takes_what_is_kept_for_a_follow_up(store, ask):
    ask(1)
    ask(2)
    store.release(KEY, "token-1")

    assert ask(3).is_acquired

    assert ask(2).is_superseded
    store.release(KEY, "token-3")
    assert store.holder(KEY) is None


def test_a_lock_is_kept_for_a_follow_up_for_a_bounded_time(store, ask):
    ask(1)
    ask(2)
    store.release(KEY, "token-1")

    other = store.acquire(KEY, "other", LONG, Claimant("other", "celery@here", 1))

    assert FOLLOW_UP_FOR - 1 < other.look_in <= FOLLOW_UP_FOR


def test_once_its_time_is_over_the_follow_up_takes_a_free_lock(store, ask):
    ask(1)
    ask(2)
    store.release(KEY, "token-1")
    store.cancel(KEY, "run-2")

    assert store.holder(KEY) is None
    assert ask(2).is_acquired


def test_a_follow_up_that_will_not_come_is_not_waited_for(store, ask):
    ask(1)
    ask(2)
    ask(3, task="shop.other", token="other")

    assert store.cancel(KEY, "run-2")
    assert not store.cancel(KEY, "run-2")

    store.release(KEY, "token-1")
    assert store.holder(KEY).task_id == "run-3"
    assert store.cancel(KEY, "run-3")
    assert store.holder(KEY) is None


def test_tasks_that_share_a_lock_have_one_follow_up_each_in_their_order(store, ask):
    ask(1)
    ask(2, task="shop.other", token="other")
    ask(3)
    ask(4, task="shop.other", token="newer")

    store.release(KEY, "token-1")

    assert store.holder(KEY).task_id == "run-4"
    assert ask(4, task="shop.other", token="newer").is_acquired
    store.release(KEY, "newer")
    assert store.holder(KEY).task_id == "run-3"
    assert ask(3).is_acquired
    store.release(KEY, "token-3")
    assert store.holder(KEY) is None


def test_a_publisher_whose_clock_is_ahead_keeps_nobody_out(store, ask):
    ahead = ask(10**18)
    store.release(KEY, f"token-{10**18}")

    assert ahead.generation < 10**18
    assert ask(0, token="later", run="later").is_acquired


def test_a_number_counts_for_its_task_alone(store, ask):
    ask(5)
    store.release(KEY, "token-5")

    assert ask(4, task="shop.other").is_acquired


def test_between_a_follow_up_and_a_place_in_line_the_first_to_come_is_first(
    store, ask, let_time_pass
):
    waiter = Claimant("waiter", "celery@there", 2)
    ask(1)
    ask(2)
    let_time_pass(0.001)
    store.acquire(KEY, "waits", LONG, waiter, Place())

    store.release(KEY, "token-1")
    assert store.holder(KEY).task_id == "run-2"
    assert ask(2).is_acquired
    ask(3)
    store.release(KEY, "token-2")

    assert store.holder(KEY).task_id == "waiter"
    assert store.acquire(KEY, "waits", LONG, waiter).is_acquired
    store.release(KEY, "waits")
    assert store.holder(KEY).task_id == "run-3"


def test_a_retry_that_the_lock_is_promised_to_goes_before_the_follow_up(store, ask):
    ask(1)
    ask(2)
    store.hold(KEY, "token-1", LONG)
    store.release(KEY, "token-1")

    assert not ask(2).is_acquired
    assert ask(1, token="retry").is_acquired
    store.release(KEY, "retry")

    assert store.holder(KEY).task_id == "run-2"


def test_a_follow_up_that_is_promised_the_lock_for_its_retry_keeps_newer_ones_out(store, ask):
    ask(1)
    ask(2)
    store.release(KEY, "token-1")
    ask(2)
    store.hold(KEY, "token-2", LONG)
    store.release(KEY, "token-2")

    assert not ask(3).is_acquired
    assert ask(2, token="retry").is_acquired
    store.release(KEY, "retry")
    assert store.holder(KEY).task_id == "run-3"


def test_who_meets_its_own_task_id_is_nobodys_follow_up(store, ask):
    ask(1)
    assert not ask(1, token="copy").is_newest

    store.release(KEY, "token-1")

    assert store.holder(KEY) is None


def test_a_lock_that_ran_out_is_the_next_ones_to_come(store, ask, let_time_pass):
    store.acquire(KEY, "a", TTL, Claimant("a", "celery@here", 1), generation=Generation("t", 1))
    ask(2, task="t")
    ask(3, task="t")
    let_time_pass(TTL * 1.2)

    # Nobody knows any more that a newer one comes: it will run after this one.
    assert ask(2, task="t").is_acquired
    assert ask(3, task="t").is_newest
