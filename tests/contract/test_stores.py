"""What every store promises."""

from __future__ import annotations

from celery_singleton_lock.stores.base import Claim, Claimant, Place

KEY = "singleton:{7}:1:report:42"
FIRST, SECOND = Claimant("first", "celery@here", 11), Claimant("second", "celery@there", 22)
TTL = 0.3
LONG = 60.0


def test_a_free_lock_is_taken_and_tells_who_has_it(store):
    acquired = store.acquire(KEY, "a", LONG, FIRST)

    assert acquired.is_acquired
    assert acquired.holder == store.holder(KEY)
    assert acquired.holder.task_id == "first"
    assert acquired.holder.worker == "celery@here"
    assert acquired.holder.pid == 11


def test_a_held_lock_is_refused_with_its_holder(store):
    first = store.acquire(KEY, "a", LONG, FIRST)

    refused = store.acquire(KEY, "b", LONG, SECOND)

    assert not refused.is_acquired
    assert refused.holder == first.holder


def test_locks_of_other_keys_are_independent(store):
    assert store.acquire(KEY, "a", LONG, FIRST).is_acquired
    assert store.acquire(KEY + "0", "b", LONG, SECOND).is_acquired


def test_asking_again_gives_the_same_lease_with_its_full_ttl(store, let_time_pass):
    first = store.acquire(KEY, "a", TTL, FIRST)
    let_time_pass(TTL * 0.6)

    again = store.acquire(KEY, "a", TTL, FIRST)
    let_time_pass(TTL * 0.6)

    assert again == first
    assert store.holder(KEY) == first.holder


def test_a_released_lock_is_free(store):
    store.acquire(KEY, "a", LONG, FIRST)

    assert store.release(KEY, "a")

    assert store.holder(KEY) is None
    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired


def test_releasing_again_changes_nothing(store):
    store.acquire(KEY, "a", LONG, FIRST)
    store.release(KEY, "a")

    assert not store.release(KEY, "a")


def test_a_stale_owner_neither_frees_nor_renews_the_next_ones_lock(store, let_time_pass):
    # Given a lock that ran out, and a second run that took it
    store.acquire(KEY, "a", TTL, FIRST)
    let_time_pass(TTL * 1.5)
    second = store.acquire(KEY, "b", LONG, SECOND)

    assert second.is_acquired
    assert not store.release(KEY, "a")
    assert not store.renew(KEY, "a", LONG)
    assert store.holder(KEY) == second.holder


def test_a_lock_that_was_held_too_short_is_kept_for_nobody_but_its_own_retry(store, let_time_pass):
    first = store.acquire(KEY, "a", LONG, FIRST)

    assert store.release(KEY, "a", at_least_for=TTL * 4)

    assert not store.acquire(KEY, "b", LONG, SECOND).is_acquired
    assert not store.renew(KEY, "a", LONG)
    retry = store.acquire(KEY, "c", LONG, FIRST)
    assert retry.is_acquired
    assert retry.holder.fencing_token > first.holder.fencing_token
    # It counts from the first start, not from the retry's.
    assert retry.holder.since == first.holder.since
    let_time_pass(TTL * 4.1)
    store.release(KEY, "c", at_least_for=TTL * 4)
    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired


def test_a_kept_lock_ends_by_itself(store, let_time_pass):
    store.acquire(KEY, "a", LONG, FIRST)
    store.release(KEY, "a", at_least_for=TTL)

    let_time_pass(TTL * 1.2)

    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired


def test_a_lock_that_was_held_long_enough_is_free_at_once(store, let_time_pass):
    store.acquire(KEY, "a", LONG, FIRST)
    let_time_pass(TTL * 1.2)

    store.release(KEY, "a", at_least_for=TTL)

    assert store.holder(KEY) is None


def test_a_promised_lock_waits_for_the_next_attempt(store, let_time_pass):
    store.acquire(KEY, "a", LONG, FIRST)
    assert store.hold(KEY, "a", TTL)
    # As long as the body goes on, nobody gets in, not even the next attempt.
    assert not store.acquire(KEY, "early", LONG, FIRST).is_acquired

    store.release(KEY, "a")

    assert not store.acquire(KEY, "b", LONG, SECOND).is_acquired
    assert store.acquire(KEY, "c", LONG, FIRST).is_acquired
    store.release(KEY, "c")
    assert store.holder(KEY) is None, "the promise was kept, and is not made again"


def test_a_promise_ends_by_itself_and_can_be_taken_back(store, let_time_pass):
    store.acquire(KEY, "a", LONG, FIRST)
    store.hold(KEY, "a", TTL)
    store.release(KEY, "a")
    let_time_pass(TTL * 1.2)
    assert store.acquire(KEY, "b", LONG, SECOND).is_acquired

    store.hold(KEY, "b", LONG)
    store.hold(KEY, "b", 0.0)
    store.release(KEY, "b")
    assert store.holder(KEY) is None


def test_a_stale_owner_promises_nothing(store):
    store.acquire(KEY, "a", LONG, FIRST)

    assert not store.hold(KEY, "other", LONG)
    store.release(KEY, "a")
    assert store.holder(KEY) is None


def test_runs_without_a_task_id_do_not_inherit_from_each_other(store):
    nobody = Claimant("", "here", 1)
    store.acquire(KEY, "a", LONG, nobody)
    store.release(KEY, "a", at_least_for=LONG)

    assert not store.acquire(KEY, "b", LONG, nobody).is_acquired


def test_a_lock_ends_with_its_ttl(store, let_time_pass):
    store.acquire(KEY, "a", TTL, FIRST)

    let_time_pass(TTL * 1.5)

    assert store.holder(KEY) is None


def test_a_renewed_lock_lives_on(store, let_time_pass):
    store.acquire(KEY, "a", TTL, FIRST)

    for _ in range(4):
        let_time_pass(TTL * 0.6)
        assert store.renew(KEY, "a", TTL)

    assert store.holder(KEY).task_id == "first"


def test_renewal_never_creates_a_lock(store, let_time_pass):
    assert not store.renew(KEY, "a", LONG)
    assert store.holder(KEY) is None

    store.acquire(KEY, "a", TTL, FIRST)
    let_time_pass(TTL * 1.5)

    assert not store.renew(KEY, "a", LONG)
    assert store.holder(KEY) is None


def test_a_lock_that_the_store_has_lost_is_put_back_as_it_was(store, let_time_pass, lose_data):
    _, holder, epoch, *_ = store.acquire(KEY, "a", LONG, FIRST)
    lose_data()

    assert store.restore(KEY, "a", TTL, holder, epoch) not in (None, epoch)

    assert store.holder(KEY) == holder
    assert not store.acquire(KEY, "b", LONG, SECOND).is_acquired
    let_time_pass(TTL * 1.5)
    assert store.acquire(KEY, "b", LONG, SECOND).holder.fencing_token > holder.fencing_token


def test_a_lock_that_was_put_back_is_renewed_and_released_like_any(store, lose_data):
    _, holder, epoch, *_ = store.acquire(KEY, "a", LONG, FIRST)
    lose_data()
    store.restore(KEY, "a", LONG, holder, epoch)

    assert store.renew(KEY, "a", LONG)
    assert store.release(KEY, "a")
    assert store.holder(KEY) is None


def test_putting_a_lock_back_again_gives_the_same_answer(store, lose_data):
    _, holder, epoch, *_ = store.acquire(KEY, "a", LONG, FIRST)
    lose_data()

    answer = store.restore(KEY, "a", LONG, holder, epoch)

    assert store.restore(KEY, "a", LONG, holder, epoch) == answer
    assert store.holder(KEY) == holder


def test_each_loss_of_data_can_be_mended_and_for_each_lock(store, lose_data):
    # Two locks of one bucket; the first one was the bucket's first.
    keys = [KEY, KEY + "0"]
    locks = {key: store.acquire(key, key, LONG, FIRST) for key in keys}
    epochs = {key: locks[key].epoch for key in keys}

    for _ in range(2):
        lose_data()
        for key in keys:
            epochs[key] = store.restore(key, key, LONG, locks[key].holder, epochs[key])
            assert epochs[key]

    assert [store.holder(key) for key in keys] == [locks[key].holder for key in keys]


def test_a_lock_that_ended_in_any_other_way_is_not_put_back(store, let_time_pass):
    _, holder, epoch, *_ = store.acquire(KEY, "a", TTL, FIRST)
    let_time_pass(TTL * 1.5)
    assert store.restore(KEY, "a", LONG, holder, epoch) is None

    _, holder, epoch, *_ = store.acquire(KEY, "b", LONG, FIRST)
    store.release(KEY, "b")
    assert store.restore(KEY, "b", LONG, holder, epoch) is None

    assert store.holder(KEY) is None


def test_a_lock_that_is_somebody_elses_by_now_is_not_put_back(store, lose_data):
    _, holder, epoch, *_ = store.acquire(KEY, "a", LONG, FIRST)
    lose_data()
    second = store.acquire(KEY, "b", LONG, SECOND)

    assert second.is_acquired
    assert store.restore(KEY, "a", LONG, holder, epoch) is None
    assert store.holder(KEY) == second.holder


def test_many_claims_are_answered_in_their_order(store):
    keys = [f"singleton:{{{n % 64}}}:1:report:{n}" for n in range(100)]
    for number, key in enumerate(keys):
        store.acquire(key, "a" if number % 3 else "other", LONG, FIRST)

    answers = store.renew_many([Claim(key, "a", LONG) for key in keys])

    assert answers == [bool(number % 3) for number in range(100)]
    assert store.renew_many([]) == []


def test_fencing_tokens_only_grow(store):
    tokens = []
    for number in range(50):
        tokens.append(store.acquire(KEY, str(number), LONG, FIRST).holder.fencing_token)
        store.release(KEY, str(number))

    assert tokens == sorted(set(tokens))
    assert all(isinstance(token, int) for token in tokens)


def test_since_is_when_the_lock_was_taken_and_does_not_move(store, let_time_pass):
    since = store.acquire(KEY, "a", LONG, FIRST).holder.since
    let_time_pass(TTL)
    store.renew(KEY, "a", LONG)

    assert store.holder(KEY).since == since


def test_the_store_answers_and_closes_and_answers_again(store):
    store.check("singleton:{0}:check:1")
    store.close()
    store.check("singleton:{0}:check:1")

    assert store.holder("singleton:{0}:check:1") is None


def test_a_worker_may_have_any_name(store):
    odd = Claimant("", "größe@{host} *?", 1)

    assert store.acquire(KEY, "a", LONG, odd).holder.worker == odd.worker


def test_a_refused_asker_hears_whether_the_holder_is_the_same_call(store):
    store.acquire(KEY, "a", LONG, FIRST._replace(call="c1"))

    assert store.acquire(KEY, "b", LONG, SECOND._replace(call="c1")).is_same_call
    assert not store.acquire(KEY, "b", LONG, SECOND._replace(call="c2")).is_same_call
    assert not store.acquire(KEY, "b", LONG, SECOND).is_same_call


def test_who_does_not_tell_its_call_is_the_same_as_nobody(store):
    store.acquire(KEY, "a", LONG, FIRST)

    assert not store.acquire(KEY, "b", LONG, SECOND).is_same_call


def test_the_call_of_a_kept_and_of_a_handed_over_lock_is_told(store):
    store.acquire(KEY, "a", LONG, FIRST._replace(call="c1"))
    store.acquire(KEY, "b", LONG, SECOND._replace(call="c2"), Place())
    asker = Claimant("third", "celery@here", 33, "c2")

    store.release(KEY, "a")
    assert store.acquire(KEY, "c", LONG, asker).is_same_call
    store.acquire(KEY, "b", LONG, SECOND._replace(call="c2"))
    store.hold(KEY, "b", LONG)
    store.release(KEY, "b")

    assert store.acquire(KEY, "c", LONG, asker).is_same_call
