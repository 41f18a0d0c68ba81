"""How a Redis can fail, as its store tells it: a StoreError, soon, and all is well afterwards."""

from __future__ import annotations

import socket
import time

import pytest

from celery_singleton_lock.errors import StoreError
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claim, Claimant, Place
from celery_singleton_lock.stores.redis import ACQUIRE, HOLD, RELEASE, RENEW
from fault_proxy import FaultProxy
from servers import redis_or_skip

KEY = "singleton:{7}:1:report:42"
ME = Claimant("me", "celery@here", 11)
YOU = Claimant("you", "celery@there", 12)
#: Seconds that a command may take; and until a call that took no more must be over.
LIMITS, SOON = "?socket_timeout=0.3&socket_connect_timeout=0.3", 5.0
PASSWORD = "s3cr3t-pw"

#: Fault → how the proxy does it, and what the error says.
FAULTS = {
    "refused": (FaultProxy.refuse, "did not answer: .*refused"),
    "silent": (FaultProxy.freeze, "did not answer: Timeout"),
    "reset": (FaultProxy.cut, "did not answer: .*(reset|closed)"),
    "reply lost": (FaultProxy.lose_replies, "did not answer: .*closed"),
    "loading": (
        lambda proxy: proxy.answer("LOADING Redis is loading the dataset in memory"),
        "did not answer: Redis is loading",
    ),
    "full": (
        lambda proxy: proxy.answer("ERR max number of clients reached"),
        "did not answer: max number of clients",
    ),
    "busy": (
        lambda proxy: proxy.answer("BUSY Redis is busy running a script."),
        "refused: .*busy",
    ),
    "cannot save": (
        lambda proxy: proxy.answer("MISCONF Redis is configured to save RDB snapshots"),
        "refused: .*MISCONF",
    ),
}
VERBS = {
    "acquire": lambda store: store.acquire(KEY, "a", 60.0, ME),
    "renew": lambda store: store.renew(KEY, "a", 60.0),
    "release": lambda store: store.release(KEY, "a"),
    "hold": lambda store: store.hold(KEY, "a", 60.0),
}


@pytest.fixture(scope="module")
def server():
    """A Redis that these tests may set as they like."""
    with redis_or_skip() as server:
        for script in (ACQUIRE, RENEW, RELEASE, HOLD):
            server.client().script_load(script.source)  # the first reply is not to be NOSCRIPT
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def proxy(server, client):
    proxy = FaultProxy(server.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def new_store():
    stores = []

    def new_store(url):
        stores.append(store_from_url(url + LIMITS, "the test"))
        return stores[-1]

    yield new_store
    for each in stores:
        each.close()


@pytest.fixture
def store(proxy, new_store):
    return new_store(proxy.url())


@pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "new"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_a_store_error_soon_and_the_store_works_after_it(
    store, proxy, fault, verb, is_connected
):
    begin, message = FAULTS[fault]
    if is_connected:
        store.acquire(KEY, "a", 60.0, ME)
    begin(proxy)
    began = time.monotonic()

    with pytest.raises(StoreError, match=message) as caught:
        VERBS[verb](store)

    assert time.monotonic() - began < SOON
    assert f"127.0.0.1:{proxy.port}" in str(caught.value)
    assert caught.value.__cause__ is not None
    proxy.heal()
    assert store.acquire(KEY, "a", 60.0, ME).is_acquired
    assert store.release(KEY, "a")


def test_a_connection_that_is_never_made_is_a_store_error_soon(new_store):
    # Given a listener whose queue is full: the kernel drops what else wants to connect
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        store = new_store(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        began = time.monotonic()

        with pytest.raises(StoreError, match="did not answer: Timeout"):
            store.acquire(KEY, "a", 60.0, ME)

        assert time.monotonic() - began < SOON
        for each in waiting:
            each.close()


def lose_reply(store, proxy, verb):
    """Have it done, without a word of it."""
    proxy.lose_replies()
    with pytest.raises(StoreError):
        VERBS[verb](store)
    proxy.heal()


def test_a_lock_whose_acquisition_was_not_heard_of_is_the_same_when_asked_for_again(
    store, proxy, client
):
    lose_reply(store, proxy, "acquire")
    first = store.holder(KEY)
    client.pexpire(KEY, 1000)

    again = store.acquire(KEY, "a", 60.0, ME)

    assert again[:2] == (True, first)
    assert client.pttl(KEY) > 50_000, "its ttl begins anew"
    assert not store.acquire(KEY, "b", 60.0, YOU).is_acquired


def test_a_lock_whose_release_was_not_heard_of_is_free(store, proxy):
    store.acquire(KEY, "a", 60.0, ME)

    lose_reply(store, proxy, "release")

    assert store.release(KEY, "a") is False
    assert store.holder(KEY) is None
    assert store.acquire(KEY, "b", 60.0, YOU).is_acquired


def test_a_release_that_was_not_heard_of_and_is_asked_again_frees_no_others_lock(store, proxy):
    store.acquire(KEY, "a", 60.0, ME)
    lose_reply(store, proxy, "release")
    store.acquire(KEY, "b", 60.0, YOU)

    assert store.release(KEY, "a") is False
    assert store.holder(KEY).task_id == "you"


def test_a_renewal_that_was_not_heard_of_counts(store, proxy, client):
    store.acquire(KEY, "a", 1.0, ME)

    lose_reply(store, proxy, "renew")

    assert client.pttl(KEY) > 50_000
    assert store.renew(KEY, "a", 60.0) is True


def test_a_promise_to_a_retry_that_was_not_heard_of_stands(store, proxy):
    store.acquire(KEY, "a", 60.0, ME)

    lose_reply(store, proxy, "hold")

    assert store.hold(KEY, "a", 60.0) is True
    assert store.release(KEY, "a")
    assert not store.acquire(KEY, "b", 60.0, YOU).is_acquired
    assert store.acquire(KEY, "a2", 60.0, ME).is_acquired


@pytest.mark.parametrize("renewed", [1, 100])
def test_of_renewals_that_were_not_answered_none_is_taken_for_a_loss(store, proxy, renewed):
    claims = [Claim(f"{KEY}:{number}", "a", 60.0) for number in range(renewed)]
    for claim in claims:
        store.acquire(*claim, ME)
    proxy.answer("LOADING Redis is loading the dataset in memory")

    with pytest.raises(StoreError, match="loading"):
        store.renew_many(claims)

    proxy.heal()
    assert store.renew_many(claims) == [True] * renewed


def test_a_master_that_becomes_a_replica_refuses_until_it_is_one_again(server, client, new_store):
    store = new_store(server.url())
    store.acquire(KEY, "a", 60.0, ME)
    client.replicaof("127.0.0.1", "1")
    try:
        for ask in VERBS.values():
            with pytest.raises(StoreError, match=r"refused: .*read only replica"):
                ask(store)
        with pytest.raises(StoreError, match=r"refused: .*read only replica"):
            store.acquire("singleton:{7}:1:free", "a", 60.0, ME)
    finally:
        client.replicaof("NO", "ONE")

    assert store.renew(KEY, "a", 60.0)
    assert store.release(KEY, "a")


def test_a_server_without_memory_refuses_locks_and_keeps_those_that_it_has(
    server, client, new_store
):
    other = "singleton:{7}:1:other"
    store = new_store(server.url())
    store.acquire(KEY, "a", 60.0, ME)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreError, match=r"refused: .*(OOM|maxmemory)"):
            store.acquire(other, "b", 60.0, YOU)
        assert store.renew(KEY, "a", 60.0)
        assert store.release(KEY, "a")
    finally:
        client.config_set("maxmemory", 0)

    assert store.holder(other) is None, "nothing was half taken"
    assert store.acquire(other, "b", 60.0, YOU).is_acquired


def test_a_server_without_memory_hands_locks_over_and_keeps_them_for_as_long_as_is_said(
    server, client, new_store
):
    other = "singleton:{7}:1:other"
    store = new_store(server.url())
    store.acquire(KEY, "a", 60.0, ME)
    store.acquire(KEY, "b", 60.0, YOU, Place())
    store.acquire(other, "c", 60.0, ME)
    client.config_set("maxmemory", 1)
    try:
        assert store.release(KEY, "a")
        assert store.holder(KEY).task_id == YOU.task_id
        assert store.release(other, "c", at_least_for=10.0)
        assert client.pttl(other) <= 10_000
        assert client.hget(other, "owner_token") == ""
    finally:
        client.config_set("maxmemory", 0)


@pytest.mark.parametrize("before", ["", "0ld-pw"], ids=["none", "another"])
def test_a_password_that_changes_is_refused_and_told_by_nobody(server, client, new_store, before):
    # This client's connection stays what it is, whatever password is set.
    client.config_set("requirepass", before)
    store = new_store(server.url().replace("//", f"//:{before}@" if before else "//"))
    store.acquire(KEY, "a", 60.0, ME)
    client.config_set("requirepass", PASSWORD)
    client.client_kill_filter(_type="normal", skipme=True)
    try:
        for ask in VERBS.values():
            # The first one finds that its connection was ended.
            with pytest.raises(StoreError, match=r"refused|closed|reset") as caught:
                ask(store)
            assert not any(word and word in str(caught.value) for word in (PASSWORD, before))
        with pytest.raises(StoreError, match="refused"):
            store.acquire(KEY, "a", 60.0, ME)

        client.config_set("requirepass", before)
        assert store.release(KEY, "a")
    finally:
        client.config_set("requirepass", "")
