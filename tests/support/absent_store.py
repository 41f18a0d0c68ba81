"""A store that can be away."""

from __future__ import annotations

from collections.abc import Sequence

from celery_singleton_lock.errors import Holder, StoreError
from celery_singleton_lock.stores.base import (
    Acquisition,
    Claim,
    Claimant,
    Generation,
    Place,
    Reservation,
    Reserved,
)
from celery_singleton_lock.stores.memory import MemoryStore


class AbsentStore(MemoryStore):
    """A memory store that raises StoreError while ``is_away``, and keeps count of what it is asked.

    With ``is_away_for`` it does so for one verb only, with ``loses_replies`` it does what it is
    asked, and raises all the same.
    """

    is_away = False
    is_away_for = ""
    loses_replies = False
    asked = 0

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
        return self._answer(
            super().acquire, key, owner_token, ttl, claimant, place, reserved, generation
        )

    def await_turn(self, key: str, place: Place, seconds: float) -> None:
        self._answer(super().await_turn, key, place, seconds)

    def renew_many(self, claims: Sequence[Claim]) -> list[bool]:
        return self._answer(super().renew_many, claims)

    def release(
        self,
        key: str,
        owner_token: str,
        at_least_for: float = 0.0,
        place: Place | None = None,
    ) -> bool:
        return self._answer(super().release, key, owner_token, at_least_for, place)

    def reserve(self, key: str, claimant: Claimant, seconds: float) -> Reservation:
        return self._answer(super().reserve, key, claimant, seconds)

    def cancel(self, key: str, task_id: str, at_least_for: float = 0.0) -> bool:
        return self._answer(super().cancel, key, task_id, at_least_for)

    def hold(self, key: str, owner_token: str, seconds: float) -> bool:
        return self._answer(super().hold, key, owner_token, seconds)

    def restore(
        self, key: str, owner_token: str, ttl: float, holder: Holder, epoch: str
    ) -> str | None:
        return self._answer(super().restore, key, owner_token, ttl, holder, epoch)

    def holder(self, key: str) -> Holder | None:
        return self._answer(super().holder, key)

    def _answer(self, verb, *args):
        self.asked += 1
        if self.is_away or verb.__name__ == self.is_away_for:
            raise StoreError("away")
        answer = verb(*args)
        if self.loses_replies:
            raise StoreError("the reply was lost")
        return answer
