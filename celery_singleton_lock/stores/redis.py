"""Locks in Redis, 6.2 or newer.

Every key that is ever written, where ``{23}`` is one of a constant number of buckets, the
cluster hash tag that keeps the keys of one script in one slot:

===================================== ====== ========================= ======================
key                                   type   content                   lives
===================================== ====== ========================= ======================
``singleton:{23}:1:shop.buy:0d5f…``   hash   the held lock: owner      one ttl from the last
                                             token, task id, worker,   renewal; once it is
                                             pid, call, since_us,      released, as long as it
                                             fencing token, hold_ms;   is to be kept; handed
                                             heir: the owner token     over and not confirmed:
                                             that it was handed to     2 s
``singleton:{23}:line:1:shop.buy:…``  zset   who stands in line:       10 s from the last one
                                             awake                     who joined or asked again
``…:line:…:queue``                    zset   in their queue            likewise
``…:line:…:served``                   string a counter: see line.lua   10 min from its last
                                                                       change
``…:line:…:1763700000000000``         string one place, as JSON        until it lapses
``…:line:…:1763700000000000:wake``    list   wakes its owner           2 s, or until it has
``singleton:{23}:newest:1:shop.buy…`` hash   "rerun": task name → the  1 h from the last run
                                             newest of its runs
``singleton:{23}:queued:1:shop.buy…`` hash   a reservation, as of the  until its run starts, or
                                             lock itself               as long as it was asked
``singleton:{23}:instead:1:shop.buy:  hash   as a held lock: who ran   10 min
…:<task id>``                                in the place of that run
``singleton:{23}:fencing``            hash   the bucket: its last      for ever: there are 64
                                             fencing token; epoch,
                                             when it began
===================================== ====== ========================= ======================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from ..errors import Holder, StoreError
from ..keys import beside
from .base import (
    DUE_FOR,
    FOLLOW_UP_FOR,
    HANDED_OVER_FOR,
    MOST_PASSES,
    PLACE_LIVES,
    UNTOLD,
    Acquisition,
    Claim,
    Claimant,
    Generation,
    LockStore,
    Place,
    Reservation,
    Reserved,
)
from .scripts import load_script

#: Seconds until a command, or a connection attempt, counts as not answered. Well below a
#: third of the default ttl, so that a renewal can fail and still be tried again in time.
COMMAND_TIMEOUT = 2.0

#: Seconds; longer than any place in it lives without being asked for.
LINE_LIVES = 10.0
#: Seconds; longer than a slot is usually busy while a run that was put back waits for it.
SERVED_LIVES = 600.0
#: Seconds; longer than an older update is likely to be under way once a newer one has run.
NEWEST_LIVES = 3600.0

_LINE = {
    "MOST_PASSES": MOST_PASSES,
    "HANDED_OVER_MS": round(HANDED_OVER_FOR * 1000),
    "UNTOLD": UNTOLD,
    "FOLLOW_UP_MS": round(FOLLOW_UP_FOR * 1000),
    "LINE_LIVES_MS": round(LINE_LIVES * 1000),
    "SERVED_LIVES_MS": round(SERVED_LIVES * 1000),
}
ACQUIRE = load_script("line", "succession", "acquire", **_LINE)
RENEW = load_script("renew")
RELEASE = load_script("line", "succession", "release", **_LINE)
HOLD = load_script("hold")
RESERVE = load_script("line", "reserve", **_LINE)
CANCEL = load_script("line", "succession", "cancel", **_LINE)
RESTORE = load_script("restore")

try:
    from redis.maint_notifications import MaintNotificationsConfig
except ImportError:  # redis-py before 7
    _NO_MAINTENANCE_NOTICES: dict[str, Any] = {}
else:
    # With these notices redis-py does not look whether a connection has an unread answer.
    _NO_MAINTENANCE_NOTICES = {
        "maint_notifications_config": MaintNotificationsConfig(enabled=False)
    }

T = TypeVar("T")


class RedisStore(LockStore):
    """A store for a fleet: one Redis server.

    A command is sent once and waits :data:`COMMAND_TIMEOUT` seconds at most. redis-py's own
    retries are off: only the caller knows whether asking again is safe and still in time.

    Args:
        connection_kwargs: What :class:`redis.ConnectionPool` takes, ``connection_class``
            included. Time limits given here win over :data:`COMMAND_TIMEOUT`.
    """

    is_shared_between_processes = True

    def __init__(self, connection_kwargs: Mapping[str, Any]) -> None:
        kwargs = dict(connection_kwargs)
        connection_class = kwargs.pop("connection_class", redis.Connection)
        if issubclass(connection_class, redis.Connection):
            kwargs.setdefault("socket_connect_timeout", COMMAND_TIMEOUT)
        kwargs.setdefault("socket_timeout", COMMAND_TIMEOUT)
        kwargs.update(
            decode_responses=True,
            encoding="utf-8",
            max_connections=2**31,  # None means 100 to redis-py 8
            **_NO_MAINTENANCE_NOTICES,
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            retry_on_error=[],
        )
        pool = redis.ConnectionPool(connection_class=connection_class, **kwargs)
        # A misspelt option shows now, not at the first lock.
        connection_class(**pool.connection_kwargs)
        self._client = redis.Redis(connection_pool=pool)
        self._socket_timeout: float | None = pool.connection_kwargs["socket_timeout"]
        self._address = _address(connection_class, pool.connection_kwargs)

    @classmethod
    def from_url(cls, url: str) -> RedisStore:
        """A store at ``redis://``, ``rediss://``, ``unix://`` or ``redis+socket://``.

        Options of redis-py go into the query: ``redis://host/0?socket_timeout=1``.

        Raises:
            ValueError, TypeError: The URL makes no sense. The message may quote parts of it.
        """
        try:
            pool = redis.ConnectionPool.from_url(_in_redis_py_words(url))
            return cls({**pool.connection_kwargs, "connection_class": pool.connection_class})
        except RedisError as error:
            raise ValueError(str(error)) from None

    def acquire(
        self,
        key: str,
        owner_token: str,
        ttl: float,
        claimant: Claimant,
        place: Place | None = None,
        reserved: Reserved | None = None,
        generation: Generation | None = None,
    ) -> Acquisition:
        """See :meth:`LockStore.acquire`. One round trip."""
        reserved_key, keep_ms = (reserved.key, _ms(reserved.seconds)) if reserved else (key, 0)
        keys = (key, _bucket(key), _line(key), reserved_key, beside(key, "newest"))
        update = (*(generation or ("", 0)), _ms(NEWEST_LIVES))
        args = (owner_token, _ms(ttl), *claimant, *_place_args(place), keep_ms, *update)
        is_acquired, *answer = self._ask(lambda: self._run(ACQUIRE, 5, *keys, *args))
        holder = _holder(answer[:5])
        if is_acquired:
            return Acquisition(True, holder, epoch=answer[5], generation=int(answer[6]))
        number, served, seen, look_in_ms, *more = (int(each) for each in answer[5:])
        is_queued, is_same_call, own_generation, is_newest, is_superseded = more
        return Acquisition(
            False,
            holder,
            place=place._replace(number=number, served=served) if place and number else None,
            seen=seen,
            look_in=max(0, look_in_ms) / 1000,
            is_holder_queued=bool(is_queued),
            is_same_call=bool(is_same_call),
            generation=own_generation,
            is_newest=bool(is_newest),
            is_superseded=bool(is_superseded),
        )

    def await_turn(self, key: str, place: Place, seconds: float) -> None:
        """See :meth:`LockStore.await_turn`. One blocking command."""
        # The connection's own limit must not come first: to redis-py that is a broken connection.
        longest = self._socket_timeout / 2 if self._socket_timeout else seconds
        timeout = max(0.001, min(seconds, longest))  # 0 would be for ever
        wake = f"{_line(key)}:{place.number}:wake"
        self._ask(lambda: self._client.blpop([wake], timeout=timeout))

    def renew_many(self, claims: Sequence[Claim]) -> list[bool]:
        """See :meth:`LockStore.renew_many`. One pipelined round trip, however many claims."""
        return self._ask(lambda: self._renew_in_one_trip(claims))

    def release(
        self,
        key: str,
        owner_token: str,
        at_least_for: float = 0.0,
        place: Place | None = None,
    ) -> bool:
        """See :meth:`LockStore.release`. One round trip."""
        at_least_ms = _ms(at_least_for) if at_least_for else 0
        args = (owner_token, at_least_ms, place.number if place else "")
        return bool(self._ask(lambda: self._run(RELEASE, 2, key, _line(key), *args)))

    def hold(self, key: str, owner_token: str, seconds: float) -> bool:
        """See :meth:`LockStore.hold`. One round trip."""
        hold_ms = _ms(seconds) if seconds else 0
        return bool(self._ask(lambda: self._run(HOLD, 1, key, owner_token, hold_ms)))

    def reserve(self, key: str, claimant: Claimant, seconds: float) -> Reservation:
        """See :meth:`LockStore.reserve`. One round trip."""
        args = (key, _line(key), *claimant, _ms(seconds))
        is_reserved, *answer = self._ask(lambda: self._run(RESERVE, 2, *args))
        is_running, is_same_call = answer[5:]
        return Reservation(
            bool(is_reserved), _holder(answer[:5]), bool(is_running), bool(is_same_call)
        )

    def cancel(self, key: str, task_id: str, at_least_for: float = 0.0) -> bool:
        """See :meth:`LockStore.cancel`. One round trip."""
        at_least_ms = _ms(at_least_for) if at_least_for else 0
        return bool(self._ask(lambda: self._run(CANCEL, 2, key, _line(key), task_id, at_least_ms)))

    def restore(
        self, key: str, owner_token: str, ttl: float, holder: Holder, epoch: str
    ) -> str | None:
        """See :meth:`LockStore.restore`. One round trip."""
        task_id, worker, pid, since, fencing_token = astuple(holder)
        as_it_was = (task_id, worker, pid, round(since * 1_000_000), fencing_token)
        keys_and_args = (key, _bucket(key), owner_token, _ms(ttl), epoch, *as_it_was)
        return self._ask(lambda: self._restored(*keys_and_args))

    def holder(self, key: str) -> Holder | None:
        """See :meth:`LockStore.holder`. One round trip."""
        fields = ("task_id", "worker", "pid", "since_us", "fencing_token")
        values = self._ask(lambda: self._client.hmget(key, fields))
        return None if None in values else _holder(values)

    def concerns(self) -> list[str]:
        """See :meth:`LockStore.concerns`. One round trip."""
        try:
            memory = self._ask(lambda: self._client.info("memory"))
        except StoreError:
            return []  # a user that may lock need not be allowed to ask
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy == "noeviction" or not memory.get("maxmemory"):
            return []
        return [
            f"The lock store {self} may evict locks that are held: its maxmemory-policy is "
            f"{policy}. Set it to noeviction, or give locks a Redis of their own"
        ]

    def close(self) -> None:
        """See :meth:`LockStore.close`."""
        self._client.connection_pool.disconnect()

    def __str__(self) -> str:
        return self._address

    def _ask(self, command: Callable[[], T]) -> T:
        try:
            return command()
        except (RedisError, OSError) as error:
            raise StoreError(f"The lock store {self} {_what_it_did(error)}: {error}") from error
        except BaseException:
            # A signal came between question and answer. redis-py 8 puts the connection back all
            # the same, and the next command would read this one's answer.
            self._client.connection_pool.disconnect(inuse_connections=False)
            raise

    def _run(self, script: Any, key_count: int, *keys_and_args: Any) -> Any:
        try:
            return self._client.evalsha(script.sha, key_count, *keys_and_args)
        except NoScriptError:
            return self._client.eval(script.source, key_count, *keys_and_args)

    def _restored(self, *keys_and_args: Any) -> str | None:
        try:
            return self._run(RESTORE, 2, *keys_and_args)  # type: ignore[no-any-return]
        except ResponseError as error:
            if _is_written_over(error):
                return None
            raise

    def _renew_in_one_trip(self, claims: Sequence[Claim]) -> list[bool]:
        def renew_all() -> list[Any]:
            # Plain EVALSHA: a registered script would add a SCRIPT EXISTS round trip.
            with self._client.pipeline(transaction=False) as pipeline:
                for key, owner_token, ttl in claims:
                    pipeline.evalsha(RENEW.sha, 1, key, owner_token, _ms(ttl))
                return pipeline.execute(raise_on_error=False)

        answers = renew_all()
        if any(isinstance(answer, NoScriptError) for answer in answers):
            self._client.script_load(RENEW.source)
            answers = renew_all()
        return [_is_renewed(answer) for answer in answers]


def _is_renewed(answer: Any) -> bool:
    if _is_written_over(answer):
        return False  # the others are none the worse for it
    if isinstance(answer, Exception):
        raise answer
    return bool(answer)


def _is_written_over(answer: Any) -> bool:
    """Whether somebody else has put something else under a lock's key."""
    return isinstance(answer, ResponseError) and "WRONGTYPE" in str(answer)


def _what_it_did(error: Exception) -> str:
    # redis-py before 6 gives a client that expects no cluster the text only.
    is_cluster = str(error).startswith(("MOVED ", "CLUSTERDOWN "))
    if is_cluster or isinstance(error, (MovedError, ClusterDownError)):
        return "is a node of a Redis Cluster, which cannot keep locks yet"
    if isinstance(error, (ResponseError, AuthenticationError, ReadOnlyError)):
        return "refused"
    return "did not answer"


def _bucket(key: str) -> str:
    prefix_and_tag, _, _ = key.partition("}")
    return f"{prefix_and_tag}}}:fencing"


def _line(key: str) -> str:
    return beside(key, "line")


def _place_args(place: Place | None) -> tuple[Any, ...]:
    if place is None:
        return "", 0, 0, 0
    if place.due_in is None:
        return place.number, place.served, 0, _ms(PLACE_LIVES)
    due_in_ms = _ms(place.due_in)
    return place.number, place.served, due_in_ms, due_in_ms + _ms(DUE_FOR)


def _holder(fields: Sequence[Any]) -> Holder:
    task_id, worker, pid, since_us, fencing_token = fields
    return Holder(task_id, worker, int(pid), int(since_us) / 1_000_000, int(fencing_token))


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _address(connection_class: type, kwargs: Mapping[str, Any]) -> str:
    if issubclass(connection_class, redis.UnixDomainSocketConnection):
        return f"unix://{kwargs.get('path')}?db={kwargs.get('db') or 0}"
    scheme = "rediss" if issubclass(connection_class, redis.SSLConnection) else "redis"
    host, port = str(kwargs.get("host", "localhost")), kwargs.get("port", 6379)
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}:{port}/{kwargs.get('db') or 0}"


def _in_redis_py_words(url: str) -> str:
    """Celery spells a socket ``redis+socket://…?virtual_host=1`` and TLS ``CERT_REQUIRED``."""
    parts = urlsplit(url)
    if parts.fragment or "@" in parts.query:
        raise ValueError("a password with '#' or '?' must be percent-encoded")
    is_socket = parts.scheme in ("unix", "redis+socket")
    if not is_socket and not (parts.path.strip("/") or "0").isdigit():
        raise ValueError("the database must be a number")  # redis-py would take 0 and say nothing
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "virtual_host" in query:
        query["db"] = query.pop("virtual_host")
    if "ssl_cert_reqs" in query:
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].lower().removeprefix("cert_")
    scheme = "unix" if is_socket else parts.scheme
    # By hand: urlunsplit() drops the slashes before an empty host, which redis-py insists on.
    return f"{scheme}://{parts.netloc}{parts.path}?{urlencode(query)}"
