"""Real workers as local processes, under pytest-celery's fixtures, with a real Redis.

Broker, results and the history of the bodies are in one Redis, locks in another, unless
``SINGLETON_REDIS_URL`` names one for all. Nothing is ever flushed: labels, queues and task ids
are new in each test, so a body that is left over from a failed test disturbs nobody.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestWorker,
    CeleryWorkerCluster,
    RedisTestBackend,
    RedisTestBroker,
)

import worker_app
from history import History
from local_nodes import LocalRedis, LocalWorker
from random_kills import Broker
from redis_server import RedisServer, given_url
from servers import missing, redis_or_skip
from waiting import wait_until

#: Pool → the library that it needs.
LIBRARIES = {"gevent": "gevent", "eventlet": "eventlet"}
#: Slots of a shared worker; more than the runs of one test that hold a slot.
SLOTS = {"solo": 1, "prefork": 4}

#: Seconds until the message of a dead worker comes back. Longer than the longest delay of a run
#: that was put back: so long such a message sits in a worker that lives.
VISIBILITY_TIMEOUT = 7

WORKERS = pytest.StashKey[list[CeleryTestWorker]]()


class GivenRedis:
    """The Redis that the environment names: its one database is used as it is.

    Args:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: int = 0) -> str:
        """The address, whatever the number."""
        return self._url

    def client(self, database: int = 0) -> redis.Redis:
        """A client that decodes to str."""
        return redis.Redis.from_url(self._url, decode_responses=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        for worker in item.stash.get(WORKERS, []):
            report.sections.append((f"log of {worker.hostname()}", worker.logs()[-8000:]))
    return report


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Any]:
    """The Redis of broker, results and history."""
    url = given_url()
    if url:
        yield GivenRedis(url)
        return
    with redis_or_skip() as server:
        yield server


@pytest.fixture(scope="session")
def private_server() -> Iterator[RedisServer]:
    """A Redis for locks and nothing else, so that what it is asked can be counted."""
    with redis_or_skip() as server:
        yield server


@pytest.fixture(scope="session")
def lock_server(request: pytest.FixtureRequest) -> Any:
    """The Redis where the locks of the workers are."""
    url = given_url()
    return GivenRedis(url) if url else request.getfixturevalue("private_server")


@pytest.fixture(scope="session")
def celery_broker_cluster(redis_server: Any) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(RedisTestBroker(LocalRedis(redis_server, database=0)))


@pytest.fixture(scope="session")
def celery_backend_cluster(redis_server: Any) -> CeleryBackendCluster:
    return CeleryBackendCluster(RedisTestBackend(LocalRedis(redis_server, database=1)))


@pytest.fixture(scope="session")
def settings(
    celery_broker_cluster: CeleryBrokerCluster,
    celery_backend_cluster: CeleryBackendCluster,
    lock_server: Any,
) -> dict[str, Any]:
    """What the workers and this process agree on."""
    (broker_url,) = celery_broker_cluster.config()["urls"]
    (result_backend,) = celery_backend_cluster.config()["urls"]
    return {
        "broker_url": broker_url,
        "result_backend": result_backend,
        "result_expires": 600,
        "broker_connection_retry_on_startup": True,
        "singleton_store_url": lock_server.url(),
        "history_url": result_backend,
        "include": ["ending_tasks", "conflict_tasks", "phase_tasks", "ported_tasks", "rerun_tasks"],
    }


@pytest.fixture(scope="session")
def app(settings: dict[str, Any]) -> Iterator[Celery]:
    """The workers' app, as this process sends with it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
            monkeypatch.delenv(name, raising=False)  # Celery lets them win over the settings
        worker_app.app.conf.update(settings)
        yield worker_app.app
        _close(worker_app.app)


@pytest.fixture
def new_app(app: Celery, settings: dict[str, Any]) -> Iterator[Callable[..., Celery]]:
    """Makes apps that send to the workers, with some settings of their own."""
    apps = []

    def new_app(**changed: Any) -> Celery:
        apps.append(Celery("sender", set_as_current=False, changes={**settings, **changed}))
        return apps[-1]

    yield new_app
    for each in apps:
        _close(each)


def _close(app: Celery) -> None:
    # A result that is left over, as by a failed test, would connect again when it is collected.
    # RedisTestBackend.teardown prevents that too, but wakes each lazy task that it looks at.
    for each in gc.get_objects():
        if issubclass(type(each), AsyncResult) and each.app is app:
            each.backend = None
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()
    app.close()


@pytest.fixture(scope="session")
def celery_setup_app(app: Celery) -> Celery:
    app.set_current()
    return app


@pytest.fixture(scope="session")
def default_worker_container_cls() -> type[LocalWorker]:
    return LocalWorker


@pytest.fixture(scope="session")
def launch(
    app: Celery,
    settings: dict[str, Any],
    default_worker_container_cls: type[LocalWorker],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., CeleryTestWorker]]:
    """Starts workers that live until the session ends, and does not wait for them.

    Keyword arguments beyond those of LocalWorker are settings; ``None`` takes one away.
    """
    launched = []

    def launch(
        name: str = "worker",
        pool: str = "prefork",
        concurrency: int = 2,
        app_module: str = worker_app.__name__,
        **changed: Any,
    ) -> CeleryTestWorker:
        library = LIBRARIES.get(pool)
        if library and not find_spec(library):
            missing(f"The {pool} pool needs {library}, which is not installed")
        own = {key: value for key, value in {**settings, **changed}.items() if value is not None}
        folder = tmp_path_factory.mktemp(name)
        container = default_worker_container_cls(folder, own, name, pool, concurrency, app_module)
        launched.append(CeleryTestWorker(container, app))
        return launched[-1]

    yield launch
    for worker in launched:
        worker.teardown()


@pytest.fixture(scope="session")
def shared_workers() -> dict[tuple[str, int], CeleryTestWorker]:
    return {}


@pytest.fixture
def shared_worker(
    request: pytest.FixtureRequest,
    launch: Callable[..., CeleryTestWorker],
    shared_workers: dict[tuple[str, int], CeleryTestWorker],
) -> Callable[..., CeleryTestWorker]:
    """Workers that whole sessions share: for tests that kill none and change no setting."""

    def shared_worker(pool: str, number: int = 1) -> CeleryTestWorker:
        if (pool, number) not in shared_workers:
            name = f"{pool}-{number}"
            shared_workers[pool, number] = launch(name, pool, SLOTS.get(pool, 8))
        worker = shared_workers[pool, number]
        request.node.stash.setdefault(WORKERS, []).append(worker)
        assert worker.ready(), "a shared worker must not be killed"
        return worker

    return shared_worker


@pytest.fixture
def new_log(request: pytest.FixtureRequest) -> Callable[[CeleryTestWorker], Callable[[], str]]:
    """What a worker that several tests share logs from now on; shown when this one fails."""

    def new_log(worker: CeleryTestWorker) -> Callable[[], str]:
        request.node.stash.setdefault(WORKERS, []).append(worker)
        worker.ready()
        known = len(worker.logs())
        return lambda: worker.logs()[known:]

    return new_log


@pytest.fixture
def worker(
    request: pytest.FixtureRequest, shared_worker: Callable[..., CeleryTestWorker]
) -> CeleryTestWorker:
    """A shared worker; its pool by ``parametrize(..., indirect=True)``, or else prefork."""
    return shared_worker(getattr(request, "param", "prefork"))


@pytest.fixture
def launch_worker(
    request: pytest.FixtureRequest, launch: Callable[..., CeleryTestWorker]
) -> Iterator[Callable[..., CeleryTestWorker]]:
    """Starts workers of this test's own, to be killed at will, and does not wait for them."""
    own = []

    def launch_worker(**kwargs: Any) -> CeleryTestWorker:
        own.append(launch(**kwargs))
        request.node.stash.setdefault(WORKERS, []).append(own[-1])
        return own[-1]

    yield launch_worker
    for worker in own:
        worker.teardown()


@pytest.fixture
def start_worker(
    launch_worker: Callable[..., CeleryTestWorker],
) -> Callable[..., CeleryTestWorker]:
    """Starts workers of this test's own: ``start_worker(pool=..., concurrency=..., **settings)``.

    Each is ready when the call returns.
    """

    def start_worker(**kwargs: Any) -> CeleryTestWorker:
        worker = launch_worker(**kwargs)
        worker.ready()
        return worker

    return start_worker


@pytest.fixture
def celery_worker(start_worker: Callable[..., CeleryTestWorker]) -> CeleryTestWorker:
    return start_worker(pool="threads")


@pytest.fixture
def celery_worker_cluster(celery_worker: CeleryTestWorker) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(celery_worker)


@pytest.fixture
def history(app: Celery) -> History:
    """What the bodies did."""
    return worker_app.history()


@pytest.fixture
def held_locks(lock_server: Any) -> Iterator[Callable[[], list[str]]]:
    """The keys of all locks that are held right now."""
    with lock_server.client() as client:
        yield lambda: list(client.scan_iter(worker_app.LOCK_KEYS))


@pytest.fixture
def new_label(
    app: Celery, lock_server: Any, held_locks: Callable[[], list[str]]
) -> Iterator[Callable[[], str]]:
    """Names for things to lock. Whatever a test does, all its locks are gone after it (R3)."""
    labels: list[str] = []

    def new_label() -> str:
        labels.append(uuid4().hex[:12])
        return labels[-1]

    yield new_label
    worker_app.open_gate(*labels)
    try:
        wait_until(lambda: not held_locks(), "all locks are gone", timeout=10)
    except AssertionError:
        with lock_server.client() as client:
            client.delete(*held_locks())  # one test that leaves a lock behind is enough
        raise


@pytest.fixture
def label(new_label: Callable[[], str]) -> str:
    """The name of one thing to lock."""
    return new_label()


@pytest.fixture
def broker_server() -> Iterator[RedisServer]:
    """A Redis for the one queue of a test that kills."""
    with redis_or_skip() as server:
        yield server


@pytest.fixture
def kill_settings(broker_server: RedisServer) -> dict[str, Any]:
    """Of workers that are killed, and whose messages come again soon."""
    return {
        "broker_url": broker_server.url(),
        "broker_transport_options": {
            "visibility_timeout": VISIBILITY_TIMEOUT,
            # A worker that is killed while it puts messages back bars the others so long.
            "unacked_mutex_expire": 2,
        },
        "task_default_queue": f"kills-{uuid4().hex[:12]}",
        "worker_prefetch_multiplier": 1,
        "result_expires": 3600,
    }


@pytest.fixture
def sender(new_app: Callable[..., Celery], kill_settings: dict[str, Any]) -> Celery:
    """Publishes to them."""
    return new_app(**kill_settings)


@pytest.fixture
def broker(
    sender: Celery, kill_settings: dict[str, Any], broker_server: RedisServer
) -> Iterator[Broker]:
    """Their queue."""
    with sender.connection_for_write() as connection, broker_server.client() as client:
        yield Broker(kill_settings["task_default_queue"], connection, client)
