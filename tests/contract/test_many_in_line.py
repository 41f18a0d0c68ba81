"""A lock that goes through fifty hands: in which order, and what that costs."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing
from itertools import pairwise
from typing import NamedTuple

import pytest

import queuer
from celery_singleton_lock.lease import Lease
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claimant
from servers import redis_or_skip
from waiting import wait_until
from wiretap import wiretap

KEY = "singleton:{7}:1:report:42"
LINE = "singleton:{7}:line:1:report:42"
PROCESSES, HOLD = 50, 0.01


def commands(words):
    return Counter(words.split())


# Of one hand-off. To be refused, and to get a number, a place, and the count of those let in:
JOIN = commands("evalsha hmget pttl time get set zadd pexpire")
SLEEP = commands("blpop")
# The lock is its by then; it has its fencing token:
TAKE = commands("evalsha hmget hmget time hset hset pexpire")
# The heads of those who are awake and of those in their queue; the lock is handed to the first,
# which leaves the line:
RELEASE = commands("evalsha hmget zrange get zrange time hset pexpire zrem del lpush pexpire")
# Of the last one: nobody is in line.
RELEASE_FOR_GOOD = commands("evalsha hmget zrange zrange del")
# Of one that still waits after two thirds of a second: it stands in line anew, where it stood.
SHOW = commands("evalsha hmget pttl time get get zrem zrem del set zadd pexpire")


class Played(NamedTuple):
    """What fifty processes did, and what the server heard of them."""

    turns: list[queuer.Turn]
    round_trips: Counter[str]
    commands: Counter[str]


def calls(client):
    """The commands that the server has run, those inside scripts included, without the test's."""
    rows = {name.removeprefix("cmdstat_"): row for name, row in client.info("commandstats").items()}
    return Counter({name: rows[name]["calls"] for name in rows.keys() - {"echo", "info", "zcard"}})


def times(called, count):
    return Counter({name: calls * count for name, calls in called.items()})


@pytest.fixture(scope="module")
def played():
    """Fifty processes that came while the lock was held, and then had it for 10 ms each."""
    with redis_or_skip() as server, closing(store_from_url(server.url(), "the test")) as store:
        store.check("singleton:{7}:1:check:1")  # brings the scripts there
        first = Lease(store, KEY, queuer.TTL, Claimant("first", "here", os.getpid()))
        first.acquire()
        with (
            queuer.queuers(server.url(), KEY, PROCESSES, HOLD) as processes,
            wiretap(server) as tap,
        ):
            before = calls(tap.client)
            queuer.let_come(processes)
            wait_until(lambda: tap.client.zcard(LINE) == PROCESSES, "all stand in line")
            first.release()
            turns = queuer.turns(processes)
            called = calls(tap.client) - before
    round_trips = Counter(command.words[0].lower() for command in tap.commands)
    return Played(turns, round_trips, called)


def test_nobody_is_overtaken(played):
    numbers = [turn.number for turn in played.turns]

    assert len(set(numbers)) == PROCESSES
    assert numbers == sorted(numbers)


def test_one_at_a_time_has_the_lock_and_fencing_tokens_grow_in_the_order_of_the_line(played):
    assert [pair for pair in pairwise(played.turns) if pair[1].began < pair[0].ended] == []
    tokens = [turn.fencing_token for turn in played.turns]
    assert tokens == sorted(set(tokens))


def test_a_hand_off_costs_four_round_trips(played):
    # Given how often somebody had to wait for longer than a place lives without a sign
    shows = sum(turn.waits - 1 for turn in played.turns)

    # To join the line, to sleep, to take the lock and to give it back; and the first holder's
    asked = {"evalsha": 3 * PROCESSES + shows + 1, "blpop": PROCESSES + shows}
    assert played.round_trips == asked


def test_a_hand_off_costs_twenty_eight_commands_inside_the_server(played):
    shows = sum(turn.waits - 1 for turn in played.turns)
    hand_off = JOIN + SLEEP + TAKE + RELEASE

    expected = times(hand_off, PROCESSES) + RELEASE_FOR_GOOD + times(SLEEP + SHOW, shows)
    assert played.commands == expected
    assert hand_off.total() == 28
