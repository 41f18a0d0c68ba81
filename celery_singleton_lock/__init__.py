"""Celery tasks that run at most once at a time, across the whole worker fleet."""

from .by_hand import HandLease, Lock, lock
from .conflict import Conflict
from .errors import (
    ConfigurationError,
    Holder,
    KeyDerivationError,
    LeaseLostError,
    LockHeldError,
    SingletonError,
    StoreError,
)
from .lease import Lease
from .results import DuplicateTaskError, SingletonResult
from .signals import LockEvent, lease_lost, lock_acquired, lock_refused, lock_released
from .task import SingletonTask

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Conflict",
    "DuplicateTaskError",
    "HandLease",
    "Holder",
    "KeyDerivationError",
    "Lease",
    "LeaseLostError",
    "Lock",
    "LockEvent",
    "LockHeldError",
    "SingletonError",
    "SingletonResult",
    "SingletonTask",
    "StoreError",
    "lease_lost",
    "lock",
    "lock_acquired",
    "lock_refused",
    "lock_released",
]
