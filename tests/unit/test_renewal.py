"""R4: a lock never ends before its run, and renewal never creates a lock."""

from __future__ import annotations

import logging

import pytest

from absent_store import AbsentStore
from celery_singleton_lock.lease import ChildLease
from celery_singleton_lock.renewal import LeaseRenewer
from celery_singleton_lock.stores.base import Claim, Claimant


class Renewal(LeaseRenewer):
    """A renewer whose thread is the test."""

    def _run(self) -> None:
        pass


@pytest.fixture
def renewer(clock):
    return Renewal(clock)


@pytest.fixture
def lost():
    return []


def test_a_lease_is_renewed_for_as_long_as_its_run_goes_on(renewer, new_lease, clock, lost):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)

    for _ in range(100):
        clock.advance(10)
        renewer.renew_due()

    assert lease.is_held
    assert lost == []


def test_a_released_lease_is_not_renewed_any_more(renewer, new_lease, clock, store, lost):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)
    lease.release()
    asked = store.asked

    clock.advance(10)
    renewer.renew_due()

    assert store.asked == asked
    assert store.holder("report") is None
    assert lost == []


def test_a_thousand_leases_are_renewed_in_one_trip(renewer, new_lease, clock, store, lost):
    leases = [new_lease(key=f"key {n}", ttl=30) for n in range(1000)]
    for lease in leases:
        lease.acquire()
        renewer.keep(lease, lost.append)
        clock.advance(0.004)  # the last one starts 4 s after the first
    asked = store.asked

    clock.advance(10 - 4)
    renewer.renew_due()

    assert store.asked == asked + 1
    clock.advance(25)
    assert all(lease.is_held for lease in leases)


def test_a_lease_that_another_run_has_is_reported_once(renewer, new_lease, clock, store, lost):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)
    store.release("report", lease.claim.owner_token)  # an operator, say
    new_lease(task_id="second").acquire()

    for _ in range(5):
        clock.advance(10)
        renewer.renew_due()

    assert lost == [lease]
    assert lease.is_lost


def test_renewal_outlives_a_store_that_is_away_for_half_a_ttl(
    renewer, new_lease, clock, store, lost, caplog
):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)

    store.is_away = True
    with caplog.at_level(logging.INFO, "celery_singleton_lock"):
        for _ in range(15):
            clock.advance(1)
            renewer.renew_due()
        store.is_away = False
        for _ in range(60):
            clock.advance(1)
            renewer.renew_due()

    assert lease.is_held
    assert lost == []
    # One line when it goes, one when it is back, however many tries lie between.
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_store_that_stays_away_loses_the_lease_by_the_leases_own_clock(
    renewer, new_lease, clock, store, lost
):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)

    store.is_away = True
    for _ in range(40):
        clock.advance(1)
        renewer.renew_due()

    assert lost == [lease]
    store.is_away = False
    assert store.holder("report") is None, "renewal must not have brought it back"


def test_a_lock_that_the_store_has_lost_is_put_back(renewer, new_lease, clock, store, lost, caplog):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)
    fencing_token = lease.fencing_token
    store.lose_data()

    with caplog.at_level(logging.WARNING, "celery_singleton_lock"):
        for _ in range(40):
            clock.advance(1)
            renewer.renew_due()

    assert lost == []
    assert lease.is_held
    assert store.holder("report").fencing_token == fencing_token
    (line,) = caplog.messages
    assert "report was put back" in line


def test_putting_a_lock_back_is_tried_until_the_lease_ends(renewer, new_lease, clock, store, lost):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)
    store.lose_data()
    store.is_away_for = "restore"

    for _ in range(25):
        clock.advance(1)
        renewer.renew_due()
    assert lost == []
    store.is_away_for = ""
    clock.advance(3)
    renewer.renew_due()

    assert lease.is_held
    assert store.holder("report") is not None


def test_a_callback_that_raises_does_not_end_the_renewal_of_others(
    renewer, new_lease, clock, store, caplog
):
    gone, fine = new_lease(key="gone"), new_lease(key="fine")
    for lease in (gone, fine):
        lease.acquire()
        renewer.keep(lease, lambda lease: 1 / 0)
    store.release("gone", gone.claim.owner_token)

    for _ in range(10):
        clock.advance(10)
        renewer.renew_due()

    assert fine.is_held
    assert "ZeroDivisionError" in caplog.text


def test_a_store_that_raises_what_it_should_not_loses_no_lease(
    renewer, new_lease, clock, store, lost, caplog, monkeypatch
):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)

    with monkeypatch.context() as broken:
        broken.setattr(store, "renew_many", lambda claims: 1 / 0)
        clock.advance(10)
        renewer.renew_due()
    for _ in range(30):
        clock.advance(3)
        renewer.renew_due()

    assert lease.is_held
    assert lost == []
    assert "ZeroDivisionError" in caplog.text


def test_an_abandoned_lease_is_released(renewer, new_lease, clock, store, lost, caplog):
    leases = [new_lease(key, ttl=30) for key in ("kept", "left")]
    for lease in leases:
        lease.acquire()
        renewer.keep(lease, lost.append, is_abandoned=lambda key=lease.key: key == "left")

    clock.advance(10)
    renewer.renew_due()

    assert store.holder("kept") is not None
    assert store.holder("left") is None
    assert lost == []
    assert "held left has ended" in caplog.text


def test_a_lease_that_is_over_is_not_remembered_for_its_whole_ttl(renewer, new_lease, clock):
    for number in range(100):
        lease = new_lease(str(number), ttl=24 * 3600)
        lease.acquire()
        renewer.keep(lease, print)
        lease.release()

    clock.advance(60)
    renewer.renew_due()

    assert renewer._heap == []


def test_an_outage_that_hits_only_what_is_put_back_is_told_once(
    renewer, new_lease, clock, store, lost, caplog
):
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)
    store.lose_data()
    store.is_away_for = "restore"

    with caplog.at_level(logging.INFO, "celery_singleton_lock"):
        for _ in range(25):
            clock.advance(1)
            renewer.renew_due()

    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_two_stores_take_a_trip_each(renewer, new_lease, clock, store, lost):
    other_store = AbsentStore(clock=clock)
    here, there = new_lease(key="a"), new_lease(key="b")
    there._store = other_store
    for lease in (here, there):
        lease.acquire()
        renewer.keep(lease, lost.append)

    other_store.is_away = True
    clock.advance(10)
    renewer.renew_due()
    clock.advance(25)

    assert here.is_held
    assert there.is_lost


def test_the_thread_is_a_daemon_and_ends_with_the_last_lease(new_lease):
    renewer = LeaseRenewer()
    lease = new_lease(ttl=0.03)
    lease._clock = renewer._clock
    lease.acquire()
    lease.release()

    renewer.keep(lease, print)
    thread = renewer._thread
    assert thread.daemon
    thread.join(5)

    assert not thread.is_alive()
    assert renewer._thread is None, "the next lease starts another one"


def test_a_yes_that_comes_too_late_is_asked_again_and_no_loss(
    renewer, new_lease, clock, store, lost
):
    # Given a process that is stopped between its question and the answer; another one renewed
    lease = new_lease(ttl=30)
    lease.acquire()
    renewer.keep(lease, lost.append)
    renew_many = store.renew_many

    def late(claims):
        answers = renew_many(claims)
        clock.advance(40)
        store._locks["report"].expires_at = clock() + 30
        return answers

    store.renew_many = late
    clock.advance(10)
    renewer.renew_due()
    store.renew_many = renew_many
    renewer.renew_due()

    assert lost == []
    assert lease.is_held


def test_what_a_child_holds_is_renewed_until_its_body_has_ended(renewer, store, clock, lost):
    # Given a child that takes the lock only after the main process has renewed once in vain
    has_ended = False
    claim = Claim("report", "childs", 30.0)
    renewer.keep(ChildLease(store, claim, lambda: has_ended), lost.append)
    clock.advance(10)
    renewer.renew_due()
    store.acquire("report", "childs", 30.0, Claimant("first", "celery@here", 1))

    for _ in range(20):
        clock.advance(10)
        renewer.renew_due()
    assert store.holder("report").task_id == "first"

    has_ended = True
    asked = store.asked
    clock.advance(10)
    renewer.renew_due()
    assert store.asked == asked
    assert lost == []
