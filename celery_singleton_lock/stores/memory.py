"""Locks in this process's memory: for tests and eager mode, and the readable specification.

It excludes the threads and greenlets of one process from each other, and nobody else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition

from ..errors import Holder
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

#: The owner token of a lock that is kept after its release.
_NOBODY = ""


@dataclass
class _Follower:
    claimant: Claimant
    generation: Generation
    since: float


@dataclass
class _HeldLock:
    owner_token: str
    expires_at: float
    holder: Holder
    hold: float = 0.0
    call: str = ""
    #: Task name → the newest of its runs that met the lock.
    next: dict[str, _Follower] = field(default_factory=dict)
    #: Whose follow-up it is kept for.
    follows: Generation | None = None
    #: The owner token that it was handed over to, until that owner takes it.
    heir: str = ""

    @property
    def is_kept(self) -> bool:
        return self.owner_token == _NOBODY and not self.heir

    @property
    def is_reserved(self) -> bool:
        """Whether it is kept for a run that has not been there yet."""
        return self.is_kept and not self.holder.fencing_token

    def is_for(self, owner_token: str, task_id: str, generation: Generation | None) -> bool:
        """Whether this owner may take it: as its heir, or because it is kept for its task id.

        Or for an update that is not newer.
        """
        is_kept_for_us = self.is_kept and self.holder.task_id == task_id != ""
        return is_kept_for_us or self.heir == owner_token or self._follows(generation)

    def _follows(self, generation: Generation | None) -> bool:
        kept_for = self.follows if self.is_kept else None
        is_ours = generation and kept_for and kept_for.task_name == generation.task_name
        return bool(is_ours and kept_for and generation and kept_for.number <= generation.number)

    def note_as_next(self, claimant: Claimant, generation: Generation, now: float) -> bool:
        """Whether nobody newer of the task was refused; then this one is the next."""
        name, newest = generation.task_name, self.next.get(generation.task_name)
        kept_for = self.follows if self.is_kept else None
        is_kept_for_newer = kept_for and kept_for.task_name == name and kept_for > generation
        if is_kept_for_newer or (newest and newest.generation > generation):
            return False
        self.next[name] = _Follower(claimant, generation, newest.since if newest else now)
        return True


@dataclass
class _StandingPlace:
    number: int
    owner_token: str
    claimant: Claimant
    is_awake: bool
    due_at: float
    lapses_at: float
    served: int  # by then

    @property
    def holder(self) -> Holder:
        return _holder(self.claimant, self.number / 1_000_000, 0)


class MemoryStore(LockStore):
    """A store for one process.

    Args:
        clock: Seconds since the epoch. It plays the server's clock: expiry, ``since`` and
            fencing tokens go by it.
    """

    is_shared_between_processes = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._locks: dict[str, _HeldLock] = {}
        #: Lock key → number → place.
        self._lines: dict[str, dict[int, _StandingPlace]] = {}
        #: Lock key → how often somebody was let in while somebody was in its queue.
        self._served: dict[str, int] = {}
        #: Lock key, task name → the newest of its runs that has had the lock.
        self._newest: dict[tuple[str, str], tuple[int, Holder]] = {}
        self._last_fencing_token = 0
        self._epoch = 1
        self._mutex = Condition()

    @classmethod
    def from_url(cls, url: str) -> MemoryStore:
        """A new, empty store: ``memory://`` has no options."""
        if url != "memory://":
            raise ValueError("memory:// takes no host, path or options")
        return cls()

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
        """See :meth:`LockStore.acquire`."""
        with self._mutex:
            now_us = int(self._clock() * 1_000_000)
            if generation and not 0 < generation.number <= now_us:
                generation = generation._replace(number=now_us)
            answer = self._acquire(key, owner_token, ttl, claimant, place, generation)
            if generation:
                answer = self._note_generation(key, answer, claimant, generation)
            ours = reserved and self._kept_for(reserved.key, claimant.task_id)
            if reserved and ours and answer.is_acquired:
                del self._locks[reserved.key]
            elif reserved and ours:
                ours.expires_at = self._clock() + reserved.seconds
            return answer

    def await_turn(self, key: str, place: Place, seconds: float) -> None:
        """See :meth:`LockStore.await_turn`."""
        with self._mutex:
            self._mutex.wait_for(
                lambda: place.number not in self._lines.get(key, {}), timeout=seconds
            )

    def renew_many(self, claims: Sequence[Claim]) -> list[bool]:
        """See :meth:`LockStore.renew_many`."""
        return [self._renew(claim) for claim in claims]

    def release(
        self,
        key: str,
        owner_token: str,
        at_least_for: float = 0.0,
        place: Place | None = None,
    ) -> bool:
        """See :meth:`LockStore.release`."""
        with self._mutex:
            place = self._found(key, place, owner_token)
            if place:
                self._leave(key, place.number)
            held = self._living(key)
            if held is None or owner_token not in (held.owner_token, held.heir):
                return False
            now = self._clock()
            keep = max(held.hold, held.holder.since + at_least_for - now)
            if keep > 0 and not held.heir:
                held.owner_token, held.expires_at = _NOBODY, now + keep
            else:
                self._free(key)
            return True

    def hold(self, key: str, owner_token: str, seconds: float) -> bool:
        """See :meth:`LockStore.hold`."""
        with self._mutex:
            held = self._owned(key, owner_token)
            if held is not None:
                held.hold = seconds
            return held is not None

    def reserve(self, key: str, claimant: Claimant, seconds: float) -> Reservation:
        """See :meth:`LockStore.reserve`."""
        with self._mutex:
            now = self._clock()
            held = self._living(key)
            if held is None:
                ahead, is_anybody_queued = self._next_in_line(key)
                if ahead is None:
                    self._count_served(key, is_anybody_queued)
                    held = _HeldLock(_NOBODY, now, _holder(claimant, now, 0), call=claimant.call)
                    self._locks[key] = held
                elif ahead.is_awake:
                    held = self._hand_over(key, ahead, is_anybody_queued)
                else:
                    is_same_call = claimant.call == ahead.claimant.call != ""
                    return Reservation(False, ahead.holder, False, is_same_call)
            if held.is_kept and held.holder.task_id == claimant.task_id:
                held.hold, held.expires_at = seconds, now + seconds
                return Reservation(True, held.holder, False, True)
            is_same_call = claimant.call == held.call != ""
            return Reservation(False, held.holder, held.owner_token != _NOBODY, is_same_call)

    def cancel(self, key: str, task_id: str, at_least_for: float = 0.0) -> bool:
        """See :meth:`LockStore.cancel`."""
        with self._mutex:
            held = self._kept_for(key, task_id)
            if held is None:
                return self._forget_follower(key, task_id)
            now = self._clock()
            keep_until = held.holder.since + at_least_for
            if keep_until > now and not held.is_reserved:
                held.hold, held.expires_at = 0.0, keep_until
            else:
                self._free(key)
            return True

    def restore(
        self, key: str, owner_token: str, ttl: float, holder: Holder, epoch: str
    ) -> str | None:
        """See :meth:`LockStore.restore`."""
        with self._mutex:
            held = self._living(key)
            if held is None and epoch != str(self._epoch):
                held = self._locks[key] = _HeldLock(owner_token, 0.0, holder)
                last = max(self._last_fencing_token, holder.fencing_token)
                self._last_fencing_token = last
            if held is None or held.owner_token != owner_token:
                return None
            held.expires_at = self._clock() + ttl
            return str(self._epoch)

    def lose_data(self) -> None:
        """Forget everything, as a server does that comes back empty: for tests."""
        with self._mutex:
            self._locks.clear()
            self._lines.clear()
            self._served.clear()
            self._newest.clear()
            self._last_fencing_token = 0
            self._epoch += 1

    def holder(self, key: str) -> Holder | None:
        """See :meth:`LockStore.holder`."""
        with self._mutex:
            held = self._living(key)
            return None if held is None else held.holder

    def close(self) -> None:
        """See :meth:`LockStore.close`: there is no connection."""

    def __str__(self) -> str:
        return "memory://"

    def _acquire(
        self,
        key: str,
        owner_token: str,
        ttl: float,
        claimant: Claimant,
        place: Place | None,
        generation: Generation | None,
    ) -> Acquisition:
        now = self._clock()
        place = self._found(key, place, owner_token)
        number = place.number if place else 0
        held = self._living(key)
        newest = generation and self._newest.get((key, generation.task_name))
        is_ours = held is not None and held.owner_token == owner_token
        if newest and generation and newest[0] > generation.number and not is_ours:
            return Acquisition(False, newest[1], is_superseded=True)
        if held is None:
            ahead, is_anybody_queued = self._next_in_line(key, place)
            if ahead is None:
                self._count_served(key, is_anybody_queued)
            elif ahead.is_awake:
                held = self._hand_over(key, ahead, is_anybody_queued)
            else:
                look_in = ahead.lapses_at - now
                answer = Acquisition(False, ahead.holder, look_in=look_in)
                return self._stand(key, answer, owner_token, claimant, place)
        if held is None or held.is_for(owner_token, claimant.task_id, generation):
            self._leave(key, number)
            self._last_fencing_token = max(self._last_fencing_token + 1, int(now * 1_000_000))
            since = now if held is None or held.is_reserved else held.holder.since
            holder = _holder(claimant, since, self._last_fencing_token)
            waiting = held.next if held else {}
            held = _HeldLock(owner_token, now + ttl, holder, call=claimant.call, next=waiting)
            self._locks[key] = held
        if held.owner_token == owner_token:
            held.expires_at = now + ttl
            return Acquisition(True, held.holder, str(self._epoch))
        answer = Acquisition(
            False,
            held.holder,
            look_in=held.expires_at - now,
            is_holder_queued=held.is_kept and held.hold > 0,
            is_same_call=claimant.call == held.call != "",
        )
        return self._stand(key, answer, owner_token, claimant, place)

    def _note_generation(
        self, key: str, answer: Acquisition, claimant: Claimant, generation: Generation
    ) -> Acquisition:
        answer = answer._replace(generation=generation.number)
        held = self._living(key)
        if answer.is_acquired and held:
            self._newest[key, generation.task_name] = (generation.number, answer.holder)
            return answer
        is_with_itself = answer.holder.task_id == claimant.task_id != ""
        if answer.is_superseded or is_with_itself:
            return answer
        is_newest = held is None or held.note_as_next(claimant, generation, self._clock())
        return answer._replace(is_newest=is_newest)

    def _next_in_line(
        self, key: str, asker: Place | None = None
    ) -> tuple[_StandingPlace | None, bool]:
        """For whom a free lock is; ``None``: for the asker, or for nobody.

        And whether anybody is in its queue.
        """
        now = self._clock()
        line = self._lines.get(key, {})
        for number in [number for number, each in line.items() if each.lapses_at <= now]:
            del line[number]
        in_order = [line[number] for number in sorted(line)]
        ahead = next((each for each in in_order if each.is_awake), None)
        first, served_then = math.inf, None
        if ahead:
            first, served_then = ahead.number, ahead.served
        if asker and asker.number and asker.number <= first:
            ahead, first, served_then = None, asker.number, self._served_at(key, asker)
        absent = next((each for each in in_order if not each.is_awake), None)
        if absent is None:
            return ahead, False
        served = self._served.get(key, 0)
        is_due = first == math.inf and absent.due_at <= now
        has_seen_enough = served - absent.served >= MOST_PASSES and (
            served_then is None or served - served_then < MOST_PASSES
        )
        if is_due or has_seen_enough:
            return absent, True
        return ahead, True

    def _served_at(self, key: str, place: Place) -> int:
        served = self._served.get(key, 0)
        if not place.number:
            return served
        return place.served if place.served <= served else 0  # the count has begun anew

    def _count_served(self, key: str, is_anybody_queued: bool) -> None:
        if is_anybody_queued:
            self._served[key] = self._served.get(key, 0) + 1

    def _found(self, key: str, place: Place | None, owner_token: str) -> Place | None:
        """The place with its number, if that was not told."""
        if place is None or place.number != UNTOLD:
            return place
        line = self._lines.get(key, {}).values()
        number = next((each.number for each in line if each.owner_token == owner_token), 0)
        return place._replace(number=number)

    def _leave(self, key: str, number: int) -> None:
        line = self._lines.get(key, {})
        line.pop(number, None)
        if not line:
            self._lines.pop(key, None)

    def _forget_follower(self, key: str, task_id: str) -> bool:
        held = self._living(key)
        waiting = held.next if held else {}
        names = [name for name, each in waiting.items() if each.claimant.task_id == task_id]
        for name in names:
            del waiting[name]
        return bool(names)

    def _kept_for(self, key: str, task_id: str) -> _HeldLock | None:
        held = self._living(key)
        return held if held and held.is_kept and held.holder.task_id == task_id else None

    def _free(self, key: str) -> None:
        """The lock is a follow-up's, or the first one's who is awake in its line; or nobody's."""
        waiting, now = self._locks.pop(key).next, self._clock()
        ahead, is_anybody_queued = self._next_in_line(key)
        run = min(waiting.values(), key=lambda each: each.since, default=None)
        if run and not (ahead and ahead.number / 1_000_000 < run.since):
            del waiting[run.generation.task_name]
            self._locks[key] = _HeldLock(
                _NOBODY,
                now + FOLLOW_UP_FOR,
                _holder(run.claimant, now, 0),
                hold=FOLLOW_UP_FOR,
                call=run.claimant.call,
                next=waiting,
                follows=run.generation,
            )
        elif ahead and ahead.is_awake:
            self._hand_over(key, ahead, is_anybody_queued).next = waiting

    def _hand_over(self, key: str, ahead: _StandingPlace, is_anybody_queued: bool) -> _HeldLock:
        now = self._clock()
        holder, call = _holder(ahead.claimant, now, 0), ahead.claimant.call
        expires_at = now + HANDED_OVER_FOR
        held = _HeldLock(_NOBODY, expires_at, holder, call=call, heir=ahead.owner_token)
        self._locks[key] = held
        self._leave(key, ahead.number)
        self._count_served(key, is_anybody_queued)
        self._mutex.notify_all()
        return held

    def _stand(
        self,
        key: str,
        answer: Acquisition,
        owner_token: str,
        claimant: Claimant,
        place: Place | None,
    ) -> Acquisition:
        """The answer to one who was refused, with its place in line."""
        if place is None or answer.holder.task_id == claimant.task_id != "":
            return answer
        now = self._clock()
        line = self._lines.setdefault(key, {})
        number = place.number or int(now * 1_000_000)
        while not place.number and number in line:
            number += 1
        is_awake = place.due_in is None
        due_at = now if place.due_in is None else now + place.due_in
        served = self._served_at(key, place)
        lapses_at = due_at + (PLACE_LIVES if is_awake else DUE_FOR)
        line[number] = _StandingPlace(
            number, owner_token, claimant, is_awake, due_at, lapses_at, served
        )
        return answer._replace(
            place=place._replace(number=number, served=served),
            seen=self._served.get(key, 0) - served,
        )

    def _renew(self, claim: Claim) -> bool:
        with self._mutex:
            held = self._owned(claim.key, claim.owner_token)
            if held is not None:
                held.expires_at = self._clock() + claim.ttl
            return held is not None

    def _owned(self, key: str, owner_token: str) -> _HeldLock | None:
        held = self._living(key)
        return held if held is not None and held.owner_token == owner_token else None

    def _living(self, key: str) -> _HeldLock | None:
        held = self._locks.get(key)
        if held is not None and held.expires_at <= self._clock():
            del self._locks[key]
            return None
        return held


def _holder(claimant: Claimant, since: float, fencing_token: int) -> Holder:
    return Holder(claimant.task_id, claimant.worker, claimant.pid, since, fencing_token)
