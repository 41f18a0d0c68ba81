"""One sale, run one way: publish all buyers, wait until each was served, read what happened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fleet import Fleet
from timeline import Body, overlaps, read_bodies

from . import tasks
from .progress import Display
from .servers import Servers

#: Option → what the way is called, and the task that runs it.
WAYS = {
    "plain": ("plain Task", tasks.buy_plain),
    "singleton": ("SingletonTask", tasks.buy),
    "requeue": ("SingletonTask, requeue", tasks.buy_with_requeue),
    "spin": ("tutorial spin lock", tasks.buy_with_spin_lock),
}

#: Seconds without anyone being served until the sale is given up.
STALLED_AFTER = 60.0


class SaleStalledError(RuntimeError):
    """Nobody was served for :data:`STALLED_AFTER` seconds."""


@dataclass(frozen=True)
class Offer:
    """What is on sale.

    Attributes:
        buyers: How many want one.
        tickets: How many there are.
        think: Seconds between a buyer's look at the stock and the purchase.
    """

    buyers: int
    tickets: int
    think: float


@dataclass(frozen=True)
class Outcome:
    """What one way of running the sale came to.

    Attributes:
        name: The way.
        buyers: How many wanted a ticket.
        sold: How many got one.
        oversold: How many of these got one that was not there.
        seconds: From the first publish to the end of the last body.
        ideal: Seconds that all buyers' thinking takes, one after the other.
        lock_commands: Commands at the lock server per buyer; ``None`` where not counted.
        bodies: Every run of the body.
    """

    name: str
    buyers: int
    sold: int
    oversold: int
    seconds: float
    ideal: float
    lock_commands: float | None
    bodies: Sequence[Body]

    @property
    def served(self) -> int:
        """How many bodies ran to their end, with a ticket or with "sold out"."""
        return len(self.bodies)

    @property
    def overlaps(self) -> int:
        """How many bodies started before an earlier one had ended."""
        return overlaps(self.bodies)

    @property
    def times_ideal(self) -> float | None:
        """How many times the ideal it took; ``None`` where nobody thinks."""
        return round(self.seconds / self.ideal, 3) if self.ideal else None

    @property
    def inside(self) -> float:
        """The bodies' own seconds, added up: thinking, and what they ask the sale's server."""
        return sum(body.end - body.start for body in self.bodies)

    def as_json(self) -> dict[str, Any]:
        """The figures, for scripts."""
        names = ("name", "buyers", "served", "sold", "oversold", "overlaps")
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": round(self.seconds, 3),
            "inside": round(self.inside, 3),
            "times_ideal": self.times_ideal,
            "lock_commands": self.lock_commands,
        }


def run_sale(way: str, offer: Offer, servers: Servers, fleet: Fleet, display: Display) -> Outcome:
    """Sell one way, and return when the last buyer has been served.

    Raises:
        SaleStalledError: Nobody is served any more.
        FleetError: A worker died.
    """
    name, task = WAYS[way]
    watch = _Watch(way, name, offer.buyers, fleet, display)
    tasks.sale_client().set(tasks.key("stock", way), offer.tickets)
    commands_before = servers.lock_commands()
    display.begin(name)
    begin = time.monotonic()
    for buyer in range(offer.buyers):
        task.delay(item=way, buyer=buyer, think=offer.think)
        if buyer % 50 == 0:
            watch.look()
    while watch.look() < offer.buyers:
        time.sleep(0.05)
    return _outcome(way, offer, begin, _per_buyer(servers, commands_before, offer))


class _Watch:
    """Sees to it that the sale goes on."""

    def __init__(self, way: str, name: str, buyers: int, fleet: Fleet, display: Display) -> None:
        self._way = way
        self._name = name
        self._buyers = buyers
        self._fleet = fleet
        self._display = display
        self._served = 0
        self._last_news = time.monotonic()

    def look(self) -> int:
        """How many have been served."""
        self._fleet.check()
        served = int(tasks.sale_client().llen(tasks.key("served", self._way)))
        self._display.show(self._name, served)
        if served > self._served:
            self._served, self._last_news = served, time.monotonic()
        elif time.monotonic() - self._last_news > STALLED_AFTER:
            raise SaleStalledError(
                f"{self._name}: {served} of {self._buyers} buyers served, and nobody "
                f"for {STALLED_AFTER:g} seconds"
            )
        return served


def _outcome(way: str, offer: Offer, begin: float, lock_commands: float | None) -> Outcome:
    client = tasks.sale_client()
    sold = int(client.llen(tasks.key("sales", way)))
    bodies = read_bodies(client, tasks.key("served", way))
    return Outcome(
        name=WAYS[way][0],
        buyers=offer.buyers,
        sold=sold,
        oversold=max(0, sold - offer.tickets),
        seconds=max(body.end for body in bodies) - begin,
        ideal=offer.buyers * offer.think,
        lock_commands=lock_commands,
        bodies=bodies,
    )


def _per_buyer(servers: Servers, commands_before: int | None, offer: Offer) -> float | None:
    commands = servers.lock_commands()
    if commands is None or commands_before is None:
        return None
    return round((commands - commands_before) / offer.buyers, 1)
