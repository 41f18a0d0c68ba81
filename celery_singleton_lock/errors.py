"""What can go wrong.

SingletonError
├── ConfigurationError    a setting or task attribute makes no sense; raised when the task is bound
├── KeyDerivationError    these arguments cannot be turned into a lock key
├── LockHeldError         another run holds the lock; carries ``holder``
│   └── DuplicateTaskError    the run was skipped; also Celery's TaskRevokedError (in ``results``)
├── LeaseLostError        the lease ended while its run was still going on
└── StoreError            the store did not answer; ``__cause__`` is the client's own error

No message carries a password or the value of an argument: arguments may be secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any


@dataclass(frozen=True)
class Holder:
    """Who has a lock, as the store tells it.

    Attributes:
        task_id: The task id of the run; empty for code that is no task.
        worker: The Celery node name, or the host name outside a worker.
        pid: The process that runs the body.
        since: When the lock was taken, in seconds since the epoch, by the store's clock.
        fencing_token: The number of this lease; only grows for one lock key.
    """

    task_id: str
    worker: str
    pid: int
    since: float
    fencing_token: int

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, timezone.utc).isoformat(" ", "seconds")
        return f"task {self.task_id or '-'} on {self.worker} (pid {self.pid}) since {since}"


class SingletonError(Exception):
    """The root of everything that this package raises."""


class ConfigurationError(SingletonError):
    """A setting or a task attribute makes no sense; the message says what would."""


class KeyDerivationError(SingletonError):
    """A call's arguments cannot be turned into a lock key.

    Raised where the caller is, before anything is published.

    Attributes:
        task_name: The task that was called.
        argument: The parameter whose value is the reason.
    """

    def __init__(self, task_name: str, argument: str, reason: str) -> None:
        super().__init__(task_name, argument, reason)
        self.task_name = task_name
        self.argument = argument
        self.reason = reason

    def __str__(self) -> str:
        return f"No lock key for {self.task_name}: argument {self.argument!r} {self.reason}"


class LockHeldError(SingletonError):
    """Another run holds the lock, so this one did not execute.

    Survives Celery's JSON and pickle result serializers with its holder: both rebuild an
    exception from ``args``, which are plain data here for that reason.

    Attributes:
        message: What happened, in words.
        holder: Who had the lock at that moment; ``None`` where nobody could tell.
    """

    def __init__(self, message: str, holder: Holder | Mapping[str, Any] | None = None) -> None:
        if isinstance(holder, Mapping):
            holder = Holder(**holder)
        super().__init__(message, None if holder is None else asdict(holder))
        self.message = message
        self.holder = holder

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"  # the message names the holder already


class LeaseLostError(SingletonError):
    """The lease ended while its run was still going on: another run may have the lock now."""

    def __init__(
        self,
        message: str = "The lease ended while its run was still going on: another run may "
        "have the lock now",
    ) -> None:
        super().__init__(message)


class StoreError(SingletonError):
    """The store did not answer, so nobody knows whether the lock is free.

    ``__cause__`` is the client library's own error.
    """
