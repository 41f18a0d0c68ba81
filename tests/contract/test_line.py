"""The line of a lock, which every store keeps: first come, first served."""

from __future__ import annotations

import time

import pytest

from celery_singleton_lock.stores.base import (
    DUE_FOR,
    HANDED_OVER_FOR,
    MOST_PASSES,
    PLACE_LIVES,
    UNTOLD,
    Claimant,
    Place,
)
from celery_singleton_lock.stores.memory import MemoryStore

KEY = "singleton:{7}:1:report:42"
LONG = 60.0
#: Long enough for what lives some seconds to be over.
AFTER = 0.1


class Runs:
    """What runs do, each by a letter that is its owner token and, with "task-", its task id."""

    def __init__(self, store):
        self._store = store
        self.places = {}

    def asks(self, letter, ttl=LONG, due_in=None, place=None, task_id=None):
        """The run asks for the lock, standing in line where it stood before."""
        claimant = Claimant(task_id or f"task-{letter}", "celery@here", 7)
        place = place or self.places.get(letter, Place())
        answer = self._store.acquire(KEY, letter, ttl, claimant, place._replace(due_in=due_in))
        self.places[letter] = answer.place or Place()
        return answer

    def has(self, letter, **kwargs):
        """The run asks, and has the lock now."""
        return self.asks(letter, **kwargs).is_acquired

    def new_one_has(self, letter):
        """The same of a run that does not stand in line."""
        claimant = Claimant(f"task-{letter}", "celery@here", 7)
        return self._store.acquire(KEY, letter, LONG, claimant).is_acquired

    def pass_on_to_new_ones(self, letter):
        """As many as may pass one who is in its queue have the lock; tells who has it then."""
        for number in range(MOST_PASSES):
            self.releases(letter)
            letter = f"new{number}"
            assert self.new_one_has(letter)
        return letter

    def releases(self, letter, **kwargs):
        """The run gives the lock back."""
        return self._store.release(KEY, letter, **kwargs)

    def leaves(self, letter):
        """The run gives up."""
        return self._store.release(KEY, letter, place=self.places[letter])

    def holder(self):
        """The letter of the run whose lock it is."""
        holder = self._store.holder(KEY)
        return holder and holder.task_id.removeprefix("task-")


@pytest.fixture
def runs(store):
    return Runs(store)


def test_the_lock_goes_to_those_in_line_in_the_order_in_which_they_came(runs):
    assert runs.has("a")
    assert not any(runs.has(letter) for letter in "bcd")

    served = []
    for before, letter in zip("abc", "bcd", strict=True):
        runs.releases(before)
        served.append(runs.holder())
        assert runs.has(letter)

    assert served == ["b", "c", "d"]


def test_the_release_itself_hands_the_lock_over(runs, store):
    taken = runs.asks("a")
    runs.asks("b")

    runs.releases("a")

    assert not runs.new_one_has("c")
    assert runs.holder() == "b"
    assert store.holder(KEY).fencing_token == 0  # none before b takes it
    assert runs.asks("b").holder.fencing_token > taken.holder.fencing_token
    assert runs.releases("b")
    assert store.holder(KEY) is None


def test_a_waiting_run_is_woken_by_the_release(runs, store):
    runs.asks("a")
    place = runs.asks("b").place
    runs.releases("a")

    before = time.monotonic()
    store.await_turn(KEY, place, 10.0)

    assert time.monotonic() - before < 0.9  # seconds; it is a blocking call of one at least
    assert runs.has("b")


def test_a_waiting_run_is_not_woken_by_the_turn_of_another(runs, store):
    runs.asks("a")
    runs.asks("b")
    place = runs.asks("c").place
    runs.releases("a")

    before = time.monotonic()
    store.await_turn(KEY, place, 0.2)

    assert time.monotonic() - before >= 0.2


def test_a_lock_that_its_heir_does_not_take_goes_to_the_next(runs, let_time_pass):
    runs.asks("a")
    runs.asks("b")
    runs.asks("c")
    runs.releases("a")

    answer = runs.asks("c")
    assert 0 < answer.look_in <= HANDED_OVER_FOR
    let_time_pass(answer.look_in + AFTER)

    assert runs.has("c")


def test_an_heir_that_comes_late_stands_where_it_stood(runs, let_time_pass):
    runs.asks("a")
    for letter in "bc":
        runs.asks(letter)
    runs.releases("a")
    let_time_pass(HANDED_OVER_FOR + AFTER)
    assert runs.has("d", place=Place())  # the others have lapsed

    runs.asks("c")
    runs.asks("b")
    runs.releases("d")

    assert runs.holder() == "b"


def test_nothing_but_its_heir_takes_a_lock_that_was_handed_over_and_nobody_renews_it(runs, store):
    runs.asks("a")
    runs.asks("b")
    runs.releases("a")

    assert not store.renew(KEY, "b", LONG)
    assert not store.hold(KEY, "b", LONG)
    assert not runs.has("b2", task_id="task-b", place=Place())
    assert runs.has("b")


@pytest.mark.parametrize("due_in", [None, 5.0])
def test_who_was_not_told_its_place_finds_it(runs, due_in):
    runs.asks("a")
    place = runs.asks("b", due_in=due_in).place
    runs.asks("c", due_in=due_in)

    again = runs.asks("c", due_in=due_in, place=Place(UNTOLD)).place
    found = runs.asks("b", due_in=due_in, place=Place(UNTOLD)).place

    assert found == place
    assert again.number > found.number


def test_who_has_no_place_that_it_was_not_told_gets_a_new_one(runs):
    runs.asks("a")
    before = runs.asks("b").place

    assert runs.asks("c", place=Place(UNTOLD)).place.number > before.number


def test_an_heir_that_was_not_told_its_place_leaves_none_behind(runs):
    runs.asks("a")
    runs.asks("b")
    runs.releases("a")

    assert runs.has("b", place=Place(UNTOLD))
    runs.releases("b")

    assert runs.holder() is None
    assert runs.new_one_has("c")


def test_a_lock_that_expired_is_not_handed_to_its_asker_but_given(runs, let_time_pass):
    runs.asks("a", ttl=PLACE_LIVES / 4)
    runs.asks("b")
    let_time_pass(PLACE_LIVES / 4 + AFTER)

    assert runs.has("b", place=Place(UNTOLD))
    runs.releases("b")
    assert runs.holder() is None


def test_who_leaves_without_having_been_told_its_place_leaves_none_behind(runs, store):
    runs.asks("a")
    runs.asks("b")

    store.release(KEY, "b", place=Place(UNTOLD))
    runs.releases("a")

    assert runs.holder() is None


def test_places_lapse_when_their_owners_show_no_sign_of_life(runs, let_time_pass):
    runs.asks("a")
    for letter in "bcdefg":
        runs.asks(letter)
    let_time_pass(PLACE_LIVES / 2)
    runs.asks("g")
    let_time_pass(PLACE_LIVES / 2 + AFTER)

    runs.releases("a")

    assert runs.holder() == "g"


def test_who_leaves_is_passed_over(runs):
    runs.asks("a")
    runs.asks("b")
    runs.asks("c")

    assert not runs.leaves("b")
    runs.releases("a")

    assert runs.holder() == "c"


def test_who_leaves_when_the_lock_was_handed_over_already_passes_it_on(runs):
    runs.asks("a")
    runs.asks("b")
    runs.asks("c")
    runs.releases("a")

    assert runs.leaves("b")

    assert runs.holder() == "c"


def test_a_lock_that_expired_goes_to_who_waits_and_not_to_who_comes(runs, let_time_pass):
    runs.asks("a", ttl=PLACE_LIVES / 4)
    runs.asks("b")
    let_time_pass(PLACE_LIVES / 4 + AFTER)

    refused = runs.asks("c")

    assert not refused.is_acquired
    assert refused.holder.task_id == "task-b"
    assert runs.holder() == "b"
    assert runs.has("b")


def test_a_lock_that_expired_goes_to_the_first_who_waits_whoever_asks_first(runs, let_time_pass):
    runs.asks("a", ttl=PLACE_LIVES / 4)
    runs.asks("b")
    runs.asks("c")
    let_time_pass(PLACE_LIVES / 4 + AFTER)

    assert not runs.has("c")
    assert runs.holder() == "b"


def test_who_waits_learns_when_the_lease_that_it_meets_would_end(runs):
    runs.asks("a", ttl=10.0)

    assert 9.0 < runs.asks("b").look_in <= 10.0


def test_a_run_that_is_due_is_given_way(runs, let_time_pass):
    runs.asks("a")
    runs.asks("b", due_in=0.3)
    let_time_pass(0.3 + AFTER)
    runs.releases("a")

    assert runs.holder() is None
    assert not runs.new_one_has("c")
    refused = runs.asks("d")
    assert not refused.is_acquired
    assert refused.holder.task_id == "task-b"
    assert runs.has("b2", task_id="task-b", place=runs.places["b"])
    runs.leaves("d")
    runs.releases("b2")
    assert runs.holder() is None  # it is in line no more


def test_a_run_that_is_due_and_does_not_come_is_not_waited_for_any_longer(runs, let_time_pass):
    runs.asks("a")
    runs.asks("b", due_in=0.1)
    let_time_pass(0.1 + AFTER)
    runs.releases("a")

    let_time_pass(runs.asks("c").look_in + AFTER)

    assert runs.has("c")


def test_a_run_that_is_not_due_is_passed_a_few_times_and_then_waited_for(runs):
    runs.asks("a")
    runs.asks("b", due_in=5.0)

    last = runs.pass_on_to_new_ones("a")
    runs.releases(last)

    assert not runs.new_one_has("late")
    assert runs.has("b")


def test_a_run_that_comes_too_late_knows_how_many_have_passed_it(runs, let_time_pass):
    runs.asks("a")
    place = runs.asks("b", due_in=0.1).place
    runs.asks("other", due_in=5.0)
    let_time_pass(0.1 + DUE_FOR + AFTER)
    last = runs.pass_on_to_new_ones("a")

    again = runs.asks("b", due_in=5.0)

    assert again.place == place._replace(due_in=5.0)
    assert again.seen == MOST_PASSES
    runs.releases(last)
    assert not runs.new_one_has("late")


def test_a_count_that_the_line_has_begun_anew_is_known_to_be_another(runs):
    runs.asks("a")

    answer = runs.asks("b", due_in=5.0, place=Place(number=7, served=1000))

    assert answer.place == Place(number=7, served=0, due_in=5.0)
    assert answer.seen == 0


def test_who_waits_behind_a_run_that_is_not_due_is_handed_the_lock_and_that_counts(runs):
    runs.asks("a")
    assert runs.asks("b", due_in=5.0).seen == 0
    runs.asks("c")

    runs.releases("a")

    assert runs.holder() == "c"
    assert runs.asks("b", due_in=5.0).seen == 1


def test_runs_that_have_been_passed_in_their_queue_do_not_wait_for_one_another(runs):
    runs.asks("a")
    runs.asks("b", due_in=5.0)
    runs.asks("c", due_in=5.0)
    last = runs.pass_on_to_new_ones("a")
    runs.asks("e")  # awake, and new

    runs.releases(last)

    assert runs.holder() is None
    assert not runs.has("e")
    assert runs.has("c")


def test_who_has_been_passed_is_handed_the_lock_while_it_is_awake(runs):
    runs.asks("a")
    runs.asks("b", due_in=5.0)
    runs.asks("c", due_in=5.0)
    last = runs.pass_on_to_new_ones("a")
    runs.asks("c")

    runs.releases(last)

    assert runs.holder() == "c"


def test_those_who_came_before_are_let_in_before_however_many_they_are(runs):
    runs.asks("a")
    before = [f"b{number}" for number in range(MOST_PASSES + 2)]
    for letter in before:
        runs.asks(letter)
    runs.asks("c", due_in=5.0)

    runs.releases("a")

    for letter in before:
        assert runs.has(letter)
        runs.releases(letter)


def test_a_run_keeps_its_place_when_it_goes_to_its_queue_and_when_it_is_back(runs, let_time_pass):
    runs.asks("a")
    first = runs.asks("b").place
    runs.asks("c")

    queued = runs.asks("b", due_in=0.1).place
    let_time_pass(0.1 + AFTER)
    again = runs.asks("b").place
    runs.releases("a")

    assert first.number == queued.number == again.number
    assert runs.holder() == "b"


def test_nobody_stands_in_line_behind_itself(runs):
    runs.asks("a")

    again = runs.asks("a2", task_id="task-a")
    runs.releases("a")

    assert again.place is None
    assert runs.holder() is None


def test_a_lock_that_is_kept_for_a_retry_says_so_and_is_not_handed_over(runs, store):
    runs.asks("a")
    store.hold(KEY, "a", LONG)
    assert not runs.asks("b").is_holder_queued

    runs.releases("a")

    answer = runs.asks("b")
    assert not answer.is_acquired
    assert answer.is_holder_queued
    assert runs.has("a2", task_id="task-a", place=Place())


def test_a_lock_that_was_handed_over_can_be_kept_for_a_retry_like_any(runs, store):
    runs.asks("a")
    runs.asks("b")
    runs.releases("a")
    runs.asks("b")
    store.hold(KEY, "b", LONG)
    runs.releases("b")

    assert not runs.has("c")
    assert runs.has("b2", task_id="task-b", place=Place())


def test_a_lock_that_is_kept_for_a_time_has_no_holder_in_a_queue(runs):
    runs.asks("a")
    runs.asks("b")

    runs.releases("a", at_least_for=10.0)

    answer = runs.asks("b")
    assert not answer.is_acquired
    assert not answer.is_holder_queued
    assert 9.0 < answer.look_in <= 10.0


def test_who_stood_in_line_stands_there_again_in_a_store_that_has_lost_its_data(runs, lose_data):
    runs.asks("a")
    for letter in "bc":
        runs.asks(letter)
    lose_data()
    runs.asks("a")

    runs.asks("c")
    runs.asks("b")
    runs.releases("a")

    assert runs.holder() == "b"


def test_a_line_that_is_over_leaves_nothing_in_memory():
    store = MemoryStore()
    runs = Runs(store)
    for letter in "abc":
        runs.asks(letter)
    runs.releases("a")
    runs.asks("b")
    runs.leaves("c")
    runs.releases("b")

    assert (store._locks, store._lines, store._served) == ({}, {}, {})
