"""What only the Redis store promises."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import pytest
import redis

from celery_singleton_lock import stores
from celery_singleton_lock.errors import StoreError
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claim, Claimant, Generation, Place
from servers import redis_or_skip

KEY = "singleton:{7}:1:report:42"
PROBE = "singleton:{0}:check:1"
ME = Claimant("me", "celery@here", 11)


@pytest.fixture
def store(redis_server):
    redis_server.client().flushdb()
    store = store_from_url(redis_server.url(), "the test")
    yield store
    store.close()


@pytest.fixture
def client(redis_server):
    return redis_server.client()


def calls(client) -> dict[str, int]:
    """Commands that the server has run since its last CONFIG RESETSTAT, by name."""
    return {
        name.removeprefix("cmdstat_"): figures["calls"]
        for name, figures in client.info("commandstats").items()
    }


def test_a_held_lock_is_one_key_that_expires(store, client):
    store.acquire(KEY, "a", 60.0, ME)

    assert set(client.keys()) == {KEY, "singleton:{7}:fencing"}
    assert 59_000 < client.pttl(KEY) <= 60_000
    store.release(KEY, "a")
    assert client.keys() == ["singleton:{7}:fencing"]


def test_fencing_tokens_are_microseconds_to_the_last_digit(store, client):
    token = store.acquire(KEY, "a", 60.0, ME).holder.fencing_token
    seconds, microseconds = client.time()

    assert re.fullmatch(r"\d{16}", client.hget(KEY, "fencing_token"))
    bucket = client.hgetall("singleton:{7}:fencing")
    assert bucket == {"fencing_token": str(token), "epoch": str(token)}
    assert 0 <= seconds * 1_000_000 + microseconds - token < 60_000_000


def test_fencing_tokens_grow_over_the_loss_of_all_data(store, client):
    before = store.acquire(KEY, "a", 60.0, ME).holder.fencing_token
    client.flushall()

    assert store.acquire(KEY, "b", 60.0, ME).holder.fencing_token > before


def test_a_lock_is_put_back_into_a_server_that_came_back_with_an_old_snapshot(store, client):
    store.check(KEY)
    snapshot = client.hgetall("singleton:{7}:fencing")
    _, holder, epoch, *_ = store.acquire(KEY, "a", 60.0, ME)
    client.delete(KEY)
    client.hset("singleton:{7}:fencing", mapping=snapshot)

    assert store.restore(KEY, "a", 60.0, holder, epoch) == epoch == snapshot["epoch"]
    assert client.hget("singleton:{7}:fencing", "fencing_token") == str(holder.fencing_token)


def test_a_lock_that_somebody_wrote_over_is_not_put_back(store, client):
    _, holder, epoch, *_ = store.acquire(KEY, "a", 60.0, ME)
    client.flushdb()
    client.set(KEY, "somebody else's data")

    assert store.restore(KEY, "a", 60.0, holder, epoch) is None
    assert client.get(KEY) == "somebody else's data"


def test_a_lock_that_an_operator_deleted_is_not_put_back(store, client):
    _, holder, epoch, *_ = store.acquire(KEY, "a", 60.0, ME)
    client.delete(KEY)

    assert store.restore(KEY, "a", 60.0, holder, epoch) is None


def test_fencing_tokens_grow_although_the_servers_clock_lies_behind(store, client):
    ahead = 9_000_000_000_000_000  # below 2**53, far in the future
    client.hset("singleton:{7}:fencing", "fencing_token", ahead)

    assert store.acquire(KEY, "a", 60.0, ME).holder.fencing_token == ahead + 1


def test_acquire_and_release_take_one_round_trip_each(store, client):
    store.acquire(KEY, "warm", 60.0, ME)
    store.release(KEY, "warm")
    client.config_resetstat()

    store.acquire(KEY, "a", 60.0, ME)
    store.release(KEY, "a")

    sent = calls(client)
    assert sent["evalsha"] == 2
    assert not {"eval", "script|load", "hello", "client|setinfo"} & sent.keys()


def test_a_thousand_leases_are_renewed_in_one_round_trip(store, client, monkeypatch):
    claims = [Claim(f"singleton:{{{n % 64}}}:1:report:{n}", "a", 60.0) for n in range(1000)]
    for claim in claims:
        store.acquire(*claim, ME)
    store.renew_many(claims)
    sent = []
    send = redis.Connection.send_packed_command
    monkeypatch.setattr(
        redis.Connection, "send_packed_command", lambda *a, **k: sent.append(1) or send(*a, **k)
    )

    assert store.renew_many(claims) == [True] * 1000
    assert len(sent) == 1


def test_scripts_that_the_server_forgot_are_sent_again(store, client):
    store.acquire(KEY, "a", 60.0, ME)

    client.script_flush()
    assert store.renew(KEY, "a", 60.0)
    client.script_flush()
    assert store.release(KEY, "a")
    client.script_flush()
    assert store.acquire(KEY, "b", 60.0, ME).is_acquired


def test_a_server_that_is_not_there_is_a_store_error_that_names_it():
    store = store_from_url("redis://127.0.0.1:1/3", "the test")

    for ask in (
        lambda: store.acquire(KEY, "a", 1.0, ME),
        lambda: store.renew_many([Claim(KEY, "a", 1.0)]),
        lambda: store.release(KEY, "a"),
        lambda: store.holder(KEY),
        lambda: store.check(PROBE),
    ):
        with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:1/3 did not answer") as caught:
            ask()
        assert caught.value.__cause__ is not None


def test_a_password_that_is_missing_or_wrong_is_a_store_error_without_it():
    with redis_or_skip("--requirepass", "s3cr3t-pw") as server:
        right, wrong = server.url().replace("//", "//:s3cr3t-pw@"), "wr0ng-pw"
        for url in (server.url(), right.replace("s3cr3t-pw", wrong)):
            with pytest.raises(StoreError) as caught:
                store_from_url(url, "the test").check(PROBE)
            assert wrong not in str(caught.value)

        store = store_from_url(right, "the test")
        store.check(PROBE)
        store.close()
        assert "s3cr3t-pw" not in str(store)


def test_a_server_that_cannot_write_is_a_store_error(redis_server):
    with redis_or_skip("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        store = store_from_url(server.url(), "the test")
        with pytest.raises(StoreError, match=r"OOM|maxmemory"):
            store.acquire(KEY, "a", 60.0, ME)
        store.close()


def test_keys_that_are_no_locks_are_a_store_error_not_a_free_lock(store, client):
    client.set(KEY, "somebody else's data")

    with pytest.raises(StoreError, match="WRONGTYPE"):
        store.acquire(KEY, "a", 60.0, ME)


def test_a_lock_that_somebody_wrote_over_is_lost_and_takes_no_other_with_it(store, client):
    other = "singleton:{7}:1:report:43"
    store.acquire(KEY, "a", 60.0, ME)
    store.acquire(other, "a", 60.0, ME)
    client.set(KEY, "somebody else's data")

    answers = store.renew_many([Claim(KEY, "a", 60.0), Claim(other, "a", 60.0)])

    assert answers == [False, True]
    client.delete(KEY, other)


def test_every_script_says_what_it_is_for():
    scripts = [each for each in files(stores.scripts).iterdir() if each.name.endswith(".lua")]
    for script in scripts:
        head = script.read_text().split("\nlocal")[0].split("\nif")[0]
        assert script.name in ("line.lua", "succession.lua") or all(
            word in head for word in ("KEYS[1]", "ARGV[1]", "Returns")
        )
    assert len(scripts) == 9


@pytest.mark.parametrize("interrupted", ["send_packed_command", "read_response"])
def test_a_signal_between_question_and_answer_does_not_shift_the_answers(
    store, monkeypatch, interrupted
):
    # Given a connection that has been used, and a soft time limit in the middle of a command
    store.acquire(KEY, "a", 60.0, ME)
    method = getattr(redis.Connection, interrupted)

    def interrupt(connection, *args, **kwargs):
        monkeypatch.undo()
        if interrupted == "send_packed_command":
            method(connection, *args, **kwargs)
        raise SystemExit

    monkeypatch.setattr(redis.Connection, interrupted, interrupt)
    with pytest.raises(SystemExit):
        store.release(KEY, "not ours")

    # Then each later command gets its own answer
    assert store.renew_many([Claim("singleton:{7}:1:nobody", "a", 60.0)]) == [False]
    assert store.holder(KEY).task_id == "me"
    assert store.release(KEY, "a") is True


def test_more_threads_than_any_pool_has_by_default_get_an_answer(redis_server):
    store = store_from_url(redis_server.url() + "?socket_timeout=10", "the test")
    client = redis_server.client()
    together = threading.Barrier(150)
    client.client_pause(300, all=False)  # so that all of them ask at once

    def ask(number):
        together.wait()
        return store.acquire(f"singleton:{{7}}:1:many:{number}", "a", 60.0, ME).is_acquired

    with ThreadPoolExecutor(150) as threads:
        assert all(threads.map(ask, range(150)))
    store.close()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["~*", "+@all", "-evalsha"], "refused.*evalsha"),
        (["~other:*", "+@all"], "refused"),
        (["~*", "+@all", "-hset"], "refused"),
    ],
)
def test_a_user_that_may_not_lock_is_found_out_by_the_check(redis_server, client, rules, message):
    client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">s3cr3t-pw", *rules)
    url = redis_server.url().replace("//", "//limited:s3cr3t-pw@")
    store = store_from_url(url, "the test")

    with pytest.raises(StoreError, match=message):
        store.check(PROBE)

    store.close()
    client.execute_command("ACL", "DELUSER", "limited")


def test_a_lock_whose_expiry_cannot_be_set_is_not_left_behind(redis_server, client):
    client.execute_command(
        "ACL", "SETUSER", "limited", "reset", "on", ">pw", "~*", "+@all", "-pexpire"
    )
    store = store_from_url(redis_server.url().replace("//", "//limited:pw@"), "the test")

    with pytest.raises(StoreError, match="refused"):
        store.acquire(KEY, "a", 60.0, ME)

    assert not client.exists(KEY)
    store.close()
    client.execute_command("ACL", "DELUSER", "limited")


def test_a_replica_is_found_out_by_the_check(redis_server):
    with redis_or_skip("--replicaof", "127.0.0.1", str(redis_server.port)) as replica:
        store = store_from_url(replica.url(), "the test")
        with pytest.raises(StoreError, match="refused"):
            store.check(PROBE)
        store.close()


def test_a_cluster_node_is_refused_by_name():
    # Without slots, every key belongs to somebody else.
    with redis_or_skip("--cluster-enabled", "yes") as node:
        store = store_from_url(node.url(), "the test")
        with pytest.raises(StoreError, match="Redis Cluster, which cannot keep locks yet"):
            store.check(PROBE)
        store.close()


def test_a_waiting_run_is_not_cut_off_by_the_time_limit_of_its_commands(redis_server):
    store = store_from_url(redis_server.url() + "?socket_timeout=0.2", "the test")

    store.await_turn(KEY, Place(number=1), 5.0)

    store.close()


def test_what_a_line_leaves_behind_expires(store, client):
    # Given a line of one who is awake and one who is in its queue, and a lock that was handed over
    store.acquire(KEY, "a", 60.0, ME)
    for letter, due_in in [("b", None), ("c", None), ("d", 1.0)]:
        claimant = ME._replace(task_id=letter)
        store.acquire(KEY, letter, 60.0, claimant, Place(due_in=due_in))
    store.release(KEY, "a")

    keys = set(client.scan_iter())

    assert len(keys) == 8  # lock, bucket, two sets, count, two places, wake
    assert {key for key in keys if client.ttl(key) == -1} == {"singleton:{7}:fencing"}
    assert all(key.startswith("singleton:{7}:") for key in keys)
    count = {"singleton:{7}:line:1:report:42:served"}
    assert max(client.ttl(key) for key in keys - count) <= 10
    assert 590 < client.ttl(*count) <= 600  # it outlives what makes a run late: a busy slot
    client.expire(*count, 5)
    store.acquire(KEY, "e", 60.0, ME._replace(task_id="e"), Place(due_in=1.0))
    assert 590 < client.ttl(*count) <= 600


@pytest.mark.parametrize(
    ("policy", "maxmemory", "is_said"),
    [("volatile-lru", "1gb", True), ("noeviction", "1gb", False), ("volatile-lru", "0", False)],
)
def test_a_server_that_may_evict_locks_is_a_concern(redis_server, policy, maxmemory, is_said):
    with redis_or_skip("--maxmemory", maxmemory, "--maxmemory-policy", policy) as server:
        concerns = store_from_url(server.url(), "the test").concerns()

    assert [policy in line for line in concerns] == [True] * is_said


def test_a_user_that_may_not_ask_for_concerns_has_none(redis_server, client):
    client.acl_setuser("locks", enabled=True, nopass=True, keys="*", commands=["+@all", "-info"])
    url = redis_server.url().replace("redis://", "redis://locks:any@")

    store = store_from_url(url, "the test")

    assert store.concerns() == []
    client.acl_deluser("locks")


def test_what_an_update_leaves_behind_expires(store, client):
    store.acquire(KEY, "a", 60.0, ME, generation=Generation("shop.index", 1))
    store.release(KEY, "a")

    (remembered,) = set(client.keys()) - {"singleton:{7}:fencing"}
    assert remembered.startswith("singleton:{7}:newest:")
    assert 3590 < client.ttl(remembered) <= 3600


def test_what_a_publish_leaves_behind_expires(store, client):
    queued = "singleton:{7}:queued:1:report:42"
    for key in (KEY, queued):
        store.reserve(key, ME, 60.0)

    assert set(client.keys()) == {KEY, queued}
    assert [59 < client.pttl(key) / 1000 <= 60 for key in (KEY, queued)] == [True] * 2
