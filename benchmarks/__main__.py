"""What a lock costs, beside what cannot be avoided: ``tox run -e bench``.

Every figure is a ratio of two things timed in turn within this run, as the median of several
rounds: absolute times say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from hashlib import blake2b

from celery_singleton_lock.keys import call_key
from celery_singleton_lock.stores import store_from_url
from celery_singleton_lock.stores.base import Claim, Claimant
from redis_server import RedisServer

from .duplicates import leave_out_duplicates, skip_duplicates
from .handoff import medians

#: Seconds that each process in line holds the lock.
HOLD = 0.01
KEY = "singleton:{7}:1:report:42"
ME = Claimant("me", "here", 1)


def seconds(call: Callable[[], object], times: int) -> float:
    """How long ``times`` calls take."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - began


def ratio(
    one: Callable[[], object], other: Callable[[], object], rounds: int, times: int
) -> tuple[float, float]:
    """Median of ``one`` / ``other`` over interleaved rounds, and the median µs of ``one``."""
    pairs = [(seconds(one, times), seconds(other, times)) for _ in range(rounds)]
    middle = statistics.median(mine for mine, _ in pairs) / times * 1e6
    return statistics.median(mine / theirs for mine, theirs in pairs), middle


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--processes", type=int, default=50, help="in line (default 50)")
    parser.add_argument("--duplicates", type=int, default=10_000, help="skipped (default 10,000)")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with RedisServer() as server:
        store, client = store_from_url(server.url(), "benchmark"), server.client()
        version = client.info("server")["redis_version"]
        print(f"Redis {version} on loopback, median of {rounds} rounds")

        def pair() -> None:
            store.acquire(KEY, "a", 30.0, ME)
            store.release(KEY, "a")

        def pings() -> None:
            client.ping()
            client.ping()

        report("acquire + release / two PINGs", *ratio(pair, pings, rounds, 500))
        claims = [Claim(f"singleton:{{{n % 64}}}:1:r:{n}", "a", 30.0) for n in range(1000)]
        for claim in claims:
            store.acquire(*claim, ME)

        def one_by_one() -> None:
            for claim in claims:
                store.renew(*claim)

        report(
            "1,000 renewals in one trip / one by one",
            *ratio(lambda: store.renew_many(claims), one_by_one, min(rounds, 5), 1),
        )
        store.close()
        client.close()
    for label, argument in (
        ("two small arguments", "anvil"),
        ("100 elements", list(range(100))),
        ("1 MB of text", "x" * 1_000_000),
    ):
        report_key(label, argument, rounds)
    report_handoff(arguments.processes, min(rounds, 5))
    report_duplicates(arguments.duplicates)


def report_key(label: str, argument: object, rounds: int) -> None:
    """The lock key of one call, beside hashing as many bytes."""

    def body(order_id, value):  # type: ignore[no-untyped-def]
        """A task."""

    signature, text = inspect.signature(body), repr(argument).encode()
    report(
        f"lock key of {label} / blake2b of as many bytes",
        *ratio(
            lambda: call_key("singleton:", "buy", "buy", signature, None, (1, argument), {}),
            lambda: blake2b(text).hexdigest(),
            rounds,
            max(1, 200_000 // len(text) // 10),
        ),
    )


def report_handoff(processes: int, rounds: int) -> None:
    """A lock that goes through many hands."""
    print(f"{processes} processes in line, {HOLD * 1000:g} ms each, median of {rounds} rounds:")
    for name, figures in medians(processes, HOLD, rounds).items():
        times_ideal, overtakes, round_trips, commands = figures
        print(
            f"{'  ' + name:<60} {times_ideal:8.2f} x ideal, {overtakes} overtakes, "
            f"{round_trips:.1f} round trips and {commands:.1f} commands a hand-off"
        )


def report_duplicates(count: int) -> None:
    """Duplicates of one run, on a real worker: by its phase."""
    for what, play in (
        ("skipped", skip_duplicates),
        ("not published, the queue empty afterwards", leave_out_duplicates),
    ):
        round_trips, seconds = play(count)
        print(
            f"{f'{count:,} duplicates, {what}':<60} {round_trips / count:8.2f} lock round "
            f"trips each   ({seconds:.1f} s)"
        )


def report(what: str, ratio: float, microseconds: float) -> None:
    """One line."""
    print(f"{what:<60} {ratio:8.2f} x   ({microseconds:,.1f} us)")


if __name__ == "__main__":
    main()
