"""R2, R4: what a lease knows of itself, by its own clock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event

import pytest

from celery_singleton_lock.errors import LeaseLostError, StoreError
from celery_singleton_lock.lease import SHOW_EVERY, NestedLease, NullLease
from celery_singleton_lock.stores.base import Place


@contextmanager
def lost_reply(store):
    """What is asked within is carried out, and not heard of."""
    store.loses_replies = True
    with pytest.raises(StoreError):
        yield
    store.loses_replies = False


def test_an_acquired_lease_is_held_and_has_a_fencing_token(new_lease):
    lease = new_lease()

    holder = lease.acquire().holder

    assert lease.is_held
    assert lease.fencing_token == holder.fencing_token > 0
    assert holder.task_id == "first"
    lease.check()


def test_a_refused_lease_learns_who_has_the_lock_and_frees_nothing(new_lease, store):
    new_lease(task_id="first").acquire()
    refused = new_lease(task_id="second")

    holder = refused.acquire().holder

    assert holder.task_id == "first"
    assert not refused.is_held
    assert not refused.is_lost
    asked = store.asked
    assert not refused.release()
    assert store.asked == asked
    assert store.holder("report").task_id == "first"


def test_a_released_lock_is_anyones_and_a_second_release_asks_nothing(new_lease, store):
    lease = new_lease()
    lease.acquire()

    assert lease.release()

    asked = store.asked
    assert not lease.release()
    assert store.asked == asked
    assert not lease.is_lost
    new_lease(task_id="second").acquire()
    assert store.holder("report").task_id == "second"


def test_a_lease_that_nobody_renewed_is_lost_by_its_own_clock(new_lease, clock):
    lease = new_lease(ttl=10)
    lease.acquire()

    clock.advance(9.9)
    assert not lease.is_lost
    clock.advance(0.1)

    assert lease.is_lost
    with pytest.raises(LeaseLostError, match="report"):
        lease.check()


def test_the_lease_counts_from_before_it_asked_so_it_ends_before_the_stores_ttl(new_lease, clock):
    # Given a store that takes three seconds to answer
    lease = new_lease(ttl=10)
    acquire = lease.store.acquire

    def slowly(*args):
        answer = acquire(*args)
        clock.advance(3)
        return answer

    lease.store.acquire = slowly
    lease.acquire()

    assert lease.expires_at == clock() - 3 + 10


def test_a_store_that_answers_after_the_ttl_gives_no_lease(new_lease, store, clock):
    lease = new_lease(ttl=10)
    acquire = store.acquire

    def slowly(*args):
        answer = acquire(*args)
        clock.advance(10)
        return answer

    store.acquire = slowly

    with pytest.raises(StoreError, match="took longer to answer than the ttl"):
        lease.acquire()
    assert not lease.is_held
    assert lease.fencing_token == 0


def test_a_late_release_leaves_the_next_holder_alone(new_lease, store, clock):
    # Given a lease that ran out, and a second run that took the lock
    first, second = new_lease(task_id="first", ttl=10), new_lease(task_id="second", ttl=10)
    first.acquire()
    clock.advance(11)
    second.acquire()

    # When the first run releases at last
    assert not first.release()

    assert first.is_lost
    assert store.holder("report").task_id == "second"


def test_fencing_tokens_grow_even_when_the_clock_stands_still(new_lease):
    tokens = []
    for _ in range(5):
        lease = new_lease()
        lease.acquire()
        tokens.append(lease.fencing_token)
        lease.release()

    assert tokens == sorted(set(tokens))


def test_after_a_lost_reply_asking_again_gives_the_same_lease(new_lease, store):
    lease = new_lease()
    with lost_reply(store):
        lease.acquire()

    assert lease.acquire().holder.task_id == "first"
    assert lease.is_held


def test_a_lock_whose_reply_was_lost_is_given_back_all_the_same(new_lease, store):
    lease = new_lease()
    with lost_reply(store):
        lease.acquire()

    assert lease.release()
    assert store.holder("report") is None


def test_after_a_lost_reply_who_asks_again_stands_where_it_stands_already(new_lease, store):
    first, lease = new_lease(task_id="first"), new_lease(task_id="second")
    first.acquire()
    with lost_reply(store):
        lease.acquire(Place())
    third = new_lease(task_id="third").acquire(Place()).place

    assert lease.acquire(Place()).place.number < third.number
    lease.release()
    first.release()
    assert store.holder("report").task_id == "third"


def test_a_place_whose_reply_was_lost_is_left_all_the_same(new_lease, store):
    first, lease = new_lease(task_id="first"), new_lease(task_id="second")
    first.acquire()
    with lost_reply(store):
        lease.acquire(Place())

    lease.release()

    first.release()
    assert store.holder("report") is None


def test_a_release_that_was_interrupted_can_be_made_again(new_lease, store):
    lease = new_lease()
    lease.acquire()
    release, store.release = store.release, lambda *_: (_ for _ in ()).throw(SystemExit)
    with pytest.raises(SystemExit):
        lease.release()
    store.release = release

    assert lease.release()


def test_the_check_of_a_lease_that_was_given_back_says_so(new_lease):
    lease = new_lease()
    lease.acquire()
    lease.release()

    with pytest.raises(LeaseLostError, match="was given back"):
        lease.check()


def test_a_confirmed_loss_stays_a_loss(new_lease, clock):
    lease = new_lease()
    lease.acquire()

    lease.confirm(clock(), is_ours=False)
    lease.confirm(clock(), is_ours=True)

    assert lease.is_lost


def test_a_lease_that_has_ended_by_its_own_clock_is_not_put_back(new_lease, clock, store):
    lease = new_lease(ttl=10)
    lease.acquire()
    store.lose_data()
    clock.advance(10)

    assert not lease.restore()
    assert store.holder("report") is None


def test_a_lease_that_is_put_back_lives_a_full_ttl_from_then_on(new_lease, clock, store):
    lease = new_lease(ttl=10)
    lease.acquire()
    for _ in range(3):  # as often as the store loses it
        store.lose_data()
        clock.advance(9)
        assert lease.restore()
    clock.advance(9)

    assert lease.is_held
    assert store.holder("report") is not None


def test_a_lock_that_was_put_back_and_then_deleted_stays_deleted(new_lease, store):
    lease = new_lease()
    lease.acquire()
    store.lose_data()
    assert lease.restore()

    store.release("report", lease.claim.owner_token)  # an operator, say

    assert not lease.restore()
    assert store.holder("report") is None


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_lease_that_was_given_back_stays_so_whatever_the_store_loses(
    new_lease, store, is_answered
):
    lease = new_lease()
    lease.acquire()
    store.is_away = not is_answered
    if is_answered:
        lease.release()
    else:
        with pytest.raises(StoreError):
            lease.release()
    store.is_away = False
    store.lose_data()

    assert not lease.restore()
    assert store.holder("report") is None


def test_a_release_waits_for_a_lock_that_is_being_put_back(new_lease, store):
    lease = new_lease()
    lease.acquire()
    store.lose_data()
    has_begun, may_go_on, restore = Event(), Event(), store.restore

    def slow_restore(*args):
        has_begun.set()
        assert may_go_on.wait(10)
        return restore(*args)

    store.restore = slow_restore
    with ThreadPoolExecutor(2) as threads:
        put_back = threads.submit(lease.restore)
        assert has_begun.wait(10)
        released = threads.submit(lease.release)
        assert not wait([released], timeout=0.1).done
        may_go_on.set()

    assert put_back.result()
    assert released.result()
    assert store.holder("report") is None


def test_a_late_yes_proves_that_the_lock_was_never_anyone_elses(new_lease, clock):
    # Given a body that held the GIL for longer than the ttl, while the main process renewed
    lease = new_lease(ttl=10)
    lease.acquire()
    clock.advance(15)
    assert lease.is_lost

    lease.confirm(clock(), is_ours=True)

    assert lease.is_held
    assert not lease.is_lost


def test_a_nested_lease_shares_the_enclosing_ones_fate_and_does_not_release_it(new_lease, clock):
    lease = new_lease()
    lease.acquire()
    nested = NestedLease(lease)

    assert not nested.release()
    assert lease.is_held
    assert nested.fencing_token == lease.fencing_token
    clock.advance(31)
    assert nested.is_lost
    with pytest.raises(LeaseLostError):
        nested.check()


def test_the_null_lease_passes_every_check():
    lease = NullLease()

    lease.check()
    assert not lease.is_lost
    assert not lease.release()
    assert lease.fencing_token == 0


@pytest.fixture
def sleeps(store, monkeypatch):
    """For how long leases have slept in line, each time."""
    slept = []
    monkeypatch.setattr(store, "await_turn", lambda key, place, seconds: slept.append(seconds))
    return slept


def test_who_waits_sleeps_until_it_has_to_show_that_it_lives(new_lease, sleeps):
    new_lease(task_id="first").acquire()
    second = new_lease(task_id="second")
    second.acquire(Place())

    second.wait(60.0)

    assert sleeps == [SHOW_EVERY]


def test_who_waits_looks_when_the_lease_that_it_has_seen_would_end(new_lease, sleeps):
    new_lease(task_id="first", ttl=0.2).acquire()
    second = new_lease(task_id="second")
    second.acquire(Place())

    second.wait(60.0)

    assert sleeps == [pytest.approx(0.2, abs=0.01)]
    assert sleeps[0] > 0.2


def test_who_waits_for_a_moment_sleeps_no_longer(new_lease, sleeps):
    new_lease(task_id="first").acquire()
    second = new_lease(task_id="second")
    second.acquire(Place())

    second.wait(0.1)

    assert sleeps == [0.1]


def test_who_stands_nowhere_takes_a_place_before_it_sleeps(new_lease, sleeps):
    new_lease(task_id="first").acquire()
    second = new_lease(task_id="second")
    second.acquire()

    assert second.wait(60.0).place is not None
    assert sleeps == []
    second.wait(60.0)
    assert len(sleeps) == 1
