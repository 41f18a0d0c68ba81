"""What a worker checks before it takes work: that its locks have a place to live."""

from __future__ import annotations

import logging
from typing import Any

from celery import bootsteps
from celery.exceptions import CeleryCommandException

from . import advice
from .errors import SingletonError
from .locks import AppLocks
from .options import is_enabled

logger = logging.getLogger(__name__)


class StoreCheck(bootsteps.StartStopStep):
    """Refuses to start a worker that could not lock, with one line that says what to do.

    Stops before the pool does, which waits for the bodies: those that wait for the store in
    their slot are told so.
    """

    requires = ("celery.worker.components:Pool",)

    def include_if(self, worker: Any) -> bool:
        """Not where locks are switched off."""
        if not is_enabled(worker.app):
            logger.warning("singleton_enabled is False: no task of this app takes a lock")
            return False
        return True

    def create(self, worker: Any) -> None:
        """Called while the worker is set up, before its pool starts."""
        try:
            locks = AppLocks.of(worker.app)
            locks.runs_in_children = _has_child_processes(worker)
            if not locks.store.is_shared_between_processes and locks.runs_in_children:
                raise CeleryCommandException(
                    f"{locks} excludes nobody in a pool of several processes: set "
                    "singleton_store_url to a Redis, or choose --pool threads or solo",
                    exit_code=1,
                )
            locks.check()
            concerns = locks.store.concerns()
        except SingletonError as error:
            raise CeleryCommandException(f"celery-singleton-lock: {error}", exit_code=1) from error
        locks.stop_flag.set(False)
        locks.store.close()  # the first children that are forked need not inherit a connection
        logger.info("Singleton locks live in %s", locks)
        for line in (*advice.on_tasks(worker, locks.runs_in_children), *concerns):
            logger.warning(line)

    def stop(self, worker: Any) -> None:
        """Tell the runs that wait."""
        AppLocks.of(worker.app).stop_flag.set(True)

    terminate = stop


def _has_child_processes(worker: Any) -> bool:
    from celery.concurrency.prefork import TaskPool  # not where another pool will do

    return issubclass(worker.pool_cls, TaskPool)
