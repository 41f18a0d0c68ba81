"""Every way in which a run can end: how to make it happen, and what becomes of lock and message.

One table, for the tests (``tests/worker/test_every_ending.py``) and for the documentation
(``endings_page.py``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union

import celery
from packaging.version import Version

POOLS = ("prefork", "threads", "solo", "gevent", "eventlet")
CELERY = Version(celery.__version__)


class Free(NamedTuple):
    """When the lock is free.

    Attributes:
        text: For people.
        within: Seconds after the body's end, generous: the ttl is 30 s where it is not the answer.
    """

    text: str
    within: float


AT_ONCE = Free("at once", 5.0)
NOTICED = Free("noticed", 8.0)
KILLED = Free("process gone", 5.0)
BY_TTL = Free("one ttl", 5.0)
NEVER_TAKEN = Free("never taken", 5.0)


class Message(NamedTuple):
    """What becomes of the message.

    Attributes:
        text: For people.
        left: How many messages the broker has when all is over.
    """

    text: str
    left: int = 0


DONE = Message("done")
AGAIN = Message("runs again")
BACK = Message("back in the queue", 1)
LOST = Message("lost")
UNACKNOWLEDGED = Message("unacknowledged until the worker stops", 1)

#: A result's state; by the Celery version from which on it is so, where that differs.
State = Union[str, Mapping[str, str]]


class Outcome(NamedTuple):
    """What is to become of a run that ends in some way on some pool.

    Attributes:
        state: The state of its result.
        free: When its lock is free.
        message: What becomes of its message.
        runs: How many bodies have run when all is over.
        task: Another task than the ending's, of ``ending_tasks``.
    """

    state: State
    free: Free = AT_ONCE
    message: Message = DONE
    runs: int = 1
    task: str | None = None

    @property
    def states(self) -> set[str]:
        """The states that are right on the Celery that is installed."""
        return set(of_this_celery(self.state).split(" or "))


#: What is to become of it, or why it cannot happen; by the Celery version from which on it is so,
#: where that differs.
Fate = Union[Outcome, str]
Fates = Union[Fate, Mapping[str, Fate]]


@dataclass(frozen=True)
class Ending:
    """One way in which a run can end.

    Attributes:
        name: What ends it.
        how: What the task is told to do; see ``ending_tasks``.
        outcomes: By pool; text where it cannot happen, with the reason.
        task: The task, of ``ending_tasks``.
        play: Makes it happen.
        options: For ``apply_async``.
        settings: For the worker; with some, or when told so, the worker is this run's alone.
        own_worker: It does not survive this, or not as it was.
        since: The first Celery that has this.
    """

    name: str
    how: str
    outcomes: Mapping[str, Fates]
    task: str = "end"
    play: Callable[[Any], None] = lambda stage: stage.send()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_worker: bool = False
    since: str = "5.4"

    def outcome(self, pool: str) -> Fate:
        """On this pool, with the Celery that is installed."""
        return of_this_celery(self.outcomes[pool])

    @property
    def is_known_to_this_celery(self) -> bool:
        """Whether the Celery that is installed can do it."""
        return Version(self.since) <= CELERY


def of_this_celery(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return next(value[v] for v in sorted(value, key=Version, reverse=True) if Version(v) <= CELERY)


# --- how to make them happen --------------------------------------------------------------------


def kill_the_child(stage: Any) -> None:
    """As the kernel does when memory is short."""
    os.kill(stage.start().pid, signal.SIGKILL)


def terminate_the_child(stage: Any) -> None:
    """SIGTERM from outside."""
    os.kill(stage.start().pid, signal.SIGTERM)


def revoke_with(name: str) -> Callable[[Any], None]:
    """``revoke(terminate=True)`` with this signal, while the body runs."""

    def revoke(stage: Any) -> None:
        stage.start()
        stage.result.revoke(terminate=True, signal=name)

    return revoke


def revoke_in_vain(stage: Any) -> None:
    """The body survives it, and goes on for as long as it likes."""
    revoke_with("SIGTERM")(stage)
    stage.worker.wait_for_log("Terminating")
    stage.wait_for_state("REVOKED")
    stage.open_gate()


def terminate_in_vain(stage: Any) -> None:
    """The pool cannot end single runs."""
    revoke_with("SIGTERM")(stage)
    stage.worker.wait_for_log("Terminating")
    stage.open_gate()


def revoke_before_the_start(stage: Any) -> None:
    """The worker knows of it when the message comes."""
    stage.revoke_and_wait()
    stage.send()


def shut_down_warm(stage: Any) -> None:
    """SIGTERM; the body has all the time that it wants."""
    stage.start()
    stage.signal_worker("SIGTERM")
    stage.worker.wait_for_log("Warm shutdown")
    stage.open_gate()
    stage.worker.container.wait_for_exit()


def shut_down_cold(stage: Any) -> None:
    """SIGQUIT; a body that it cannot end has all the time that it wants."""
    stage.start()
    stage.signal_worker("SIGQUIT")
    if stage.pool == "threads" or (stage.pool == "solo" and Version("5.5") > CELERY):
        stage.wait_for_log("Cold shutdown", "will terminate all running tasks")
        stage.open_gate()
    if "ignore the end" in stage.ending.how:
        stage.wait_for_log("The end is ignored")
        stage.open_gate()
    # From 5.5 to 5.6 an error of Celery's own comes up there on threads, wherever the worker is at
    # that moment, and may be caught: then it goes on.
    may_go_on = stage.pool == "threads" and Version("5.5") <= CELERY < Version("5.7")
    if not may_go_on and (stage.pool != "solo" or Version("5.7") <= CELERY):
        stage.worker.container.wait_for_exit()


def shut_down_softly(stage: Any) -> None:
    """SIGQUIT, with a time in which the body may end."""
    stage.start()
    stage.signal_worker("SIGQUIT")
    stage.worker.wait_for_log("Initiating Soft Shutdown")
    stage.open_gate()
    if stage.pool != "solo" or Version("5.7") <= CELERY:
        stage.worker.container.wait_for_exit()


def kill_the_worker(stage: Any) -> None:
    """SIGKILL to the main process, as after a power cut."""
    stage.start()
    stage.signal_worker("SIGKILL")
    stage.worker.container.wait_for_exit()


def kill_the_worker_that_shuts_down(stage: Any) -> None:
    """The grace period of a supervisor is over."""
    stage.start()
    stage.signal_worker("SIGTERM")
    stage.worker.wait_for_log("Warm shutdown")
    stage.signal_worker("SIGKILL")
    stage.worker.container.wait_for_exit()


def restart_after(play: Callable[[Any], None]) -> Callable[[Any], None]:
    """Then a new worker, for whatever the first one left at the broker."""

    def play_and_restart(stage: Any) -> None:
        play(stage)
        stage.wait_for_death()
        stage.redeliver()
        stage.worker.container.start()
        stage.worker.ready()

    return play_and_restart


def die_of_memory(stage: Any) -> None:
    """The worker stops by itself, where Celery sees it."""
    stage.send()
    if stage.pool in ("prefork", "solo"):
        stage.worker.container.wait_for_exit()


def lose_the_connection(stage: Any) -> None:
    """The broker drops the worker's connections while the body runs."""
    stage.start()
    stage.drop_connections()


def lose_the_connection_for_a_while(stage: Any) -> None:
    """The copy that it delivers then meets the first one's lock, if it comes at all."""
    lose_the_connection(stage)
    if stage.is_late:
        stage.wait_for_copy()
        # Before 5.7 the copy stands behind the first one in the same child.
        if stage.pool != "prefork" or Version("5.7") <= CELERY:
            stage.worker.wait_for_log("goes back to the queue")
    stage.open_gate()


def lose_the_connection_and_the_run(stage: Any) -> None:
    """The worker ends the run, where its pool can do that."""
    lose_the_connection(stage)
    if stage.pool != "prefork":
        stage.wait_for_copy()
        stage.open_gate()


def redeliver_while_it_runs(stage: Any) -> None:
    """What the broker does when the visibility timeout is over."""
    stage.start()
    stage.redeliver()
    stage.worker.wait_for_log("goes back to the queue")
    stage.open_gate()


def redeliver_while_it_dies(stage: Any) -> None:
    """The copy that was refused for a while is the one that is left."""
    pid = stage.start().pid
    stage.redeliver()
    stage.worker.wait_for_log("goes back to the queue")
    os.kill(pid, signal.SIGKILL)


def redeliver_behind_it(stage: Any) -> None:
    """The copy waits for the only slot, and finds the result."""
    stage.start()
    stage.redeliver()
    stage.wait_for_copy()
    stage.open_gate()


def shrink_the_pool(stage: Any) -> None:
    """By remote control."""
    stage.start()
    stage.control("pool_shrink", n=1)
    stage.open_gate()


def restart_the_pool(stage: Any) -> None:
    """By remote control."""
    stage.start()
    stage.control("pool_restart")
    stage.open_gate()


# --- the table ----------------------------------------------------------------------------------

SAME = object()
NO_LIMITS = "this pool ignores time limits"
NO_SOFT_LIMIT = "this pool ignores soft time limits"
NO_CHILDREN = "this pool has no child processes"
ONE_THREAD = "this pool hears nothing while a body runs"

#: A rejection is stored since Celery 5.7; before, nobody ever hears of it.
REJECTED = {"5.4": "PENDING", "5.7": "FAILURE"}


def _ending(name: str, how: str, prefork: Any, others: Any = SAME, **more: Any) -> Ending:
    outcomes: dict[str, Any] = {"prefork": prefork}
    for pool in POOLS[1:]:
        outcome = more.pop(pool, others)
        outcomes[pool] = prefork if outcome is SAME else outcome
    return Ending(name, how, outcomes, **more)


SUCCESS, FAILURE, PENDING = Outcome("SUCCESS"), Outcome("FAILURE"), Outcome("PENDING")
SUCCESS_AGAIN = Outcome("SUCCESS", AT_ONCE, AGAIN, runs=2)
LATE = {"task": "end_late"}

BODIES: Sequence[Ending] = [
    _ending("it returns", "body: return", SUCCESS),
    _ending("it raises", "body: raise", FAILURE),
    _ending("`self.retry()`", "body: retry, once", SUCCESS_AGAIN),
    _ending(
        "`self.retry(throw=False)`, and it goes on",
        "body: retry and go on",
        SUCCESS_AGAIN,
    ),
    _ending(
        "`autoretry_for`",
        "body: raise what is retried, once",
        SUCCESS_AGAIN,
        task="end_autoretried",
    ),
    _ending("`self.retry()` too often", "body: retry", Outcome("FAILURE", AT_ONCE, AGAIN, runs=2)),
    _ending("`self.replace()`", "body: replace, once", SUCCESS_AGAIN),
    _ending("`Ignore`", "body: Ignore", PENDING),
    _ending("`Reject()`", "body: Reject", Outcome(REJECTED)),
    _ending(
        "`Reject(requeue=True)`, late acknowledgement",
        "body: Reject to the queue, once",
        SUCCESS_AGAIN,
        **LATE,
    ),
    _ending(
        "`Reject(requeue=True)`, early acknowledgement",
        "body: Reject to the queue, once",
        Outcome("PENDING", AT_ONCE, LOST),
    ),
    _ending("its result cannot be serialized", "body: return what cannot be stored", FAILURE),
    _ending(
        "the result backend raises",
        "body: return",
        FAILURE,
        task="end_unstored",
    ),
]

HOOKS: Sequence[Ending] = [
    _ending("`before_start` raises", "before_start: raise", Outcome("FAILURE", runs=0)),
    _ending("`before_start` raises `Ignore`", "before_start: Ignore", Outcome("PENDING", runs=0)),
    _ending("`before_start` raises `Reject()`", "before_start: Reject", Outcome(REJECTED, runs=0)),
    _ending(
        "`before_start` raises `Reject(requeue=True)`, late acknowledgement",
        "before_start: Reject to the queue, once",
        Outcome("SUCCESS", AT_ONCE, AGAIN),
        **LATE,
    ),
    _ending(
        "`before_start` raises `Reject(requeue=True)`, early acknowledgement",
        "before_start: Reject to the queue, once",
        Outcome("PENDING", AT_ONCE, LOST, runs=0),
    ),
    _ending(
        "`before_start` calls `self.retry()`",
        "before_start: retry, once",
        Outcome("SUCCESS", AT_ONCE, AGAIN),
    ),
    _ending("`on_success` raises", "on_success: raise", SUCCESS),
    # Before Celery 5.7 this ends a worker whose pool is solo.
    _ending("`on_failure` raises", "body: raise; on_failure: raise", FAILURE, own_worker=True),
    # Celery stores FAILURE when the retry is at the broker already: who stores first is a race.
    _ending(
        "`on_retry` raises",
        "body: retry, once; on_retry: raise",
        SUCCESS_AGAIN._replace(state="SUCCESS or FAILURE"),
    ),
    _ending("`after_return` raises", "after_return: raise", SUCCESS),
    _ending("`after_return` raises before `super()`", "before after_return: raise", SUCCESS),
]

SOFT = {"options": {"soft_time_limit": 0.5}}
HARD = {"options": {"time_limit": 1}, "own_worker": True}
TIMED_OUT = Outcome("FAILURE", KILLED)

LIMITS: Sequence[Ending] = [
    _ending("soft time limit", "body: wait", FAILURE, NO_SOFT_LIMIT, **SOFT),
    _ending(
        "soft time limit, caught",
        "body: wait, catch the soft limit",
        SUCCESS,
        NO_SOFT_LIMIT,
        **SOFT,
    ),
    _ending(
        "soft time limit in `before_start`",
        "before_start: wait",
        Outcome("FAILURE", runs=0),
        NO_SOFT_LIMIT,
        **SOFT,
    ),
    _ending("hard time limit", "body: wait", TIMED_OUT, NO_LIMITS, gevent=FAILURE, **HARD),
    _ending(
        "hard time limit, body swallows the `SystemExit`",
        "body: wait, ignore the end",
        TIMED_OUT,
        NO_LIMITS,
        gevent="the body of this pool gets a `Timeout`",
        **HARD,
    ),
    _ending(
        "hard time limit in a C call that holds the GIL",
        "body: hold the GIL",
        TIMED_OUT,
        NO_LIMITS,
        gevent=ONE_THREAD,
        **HARD,
    ),
    _ending(
        "hard time limit, and hooks that keep the main process busy meanwhile",
        "body: sleep for 1.5 s; on_failure: sleep for 3 s",
        Outcome({"5.4": "FAILURE", "5.7": "SUCCESS"}, KILLED),
        NO_LIMITS,
        gevent="hooks run in the body's greenlet",
        **HARD,
    ),
    _ending(
        "hard time limit in `before_start`",
        "before_start: wait",
        Outcome("FAILURE", KILLED, runs=0),
        NO_LIMITS,
        gevent=Outcome("FAILURE", runs=0),
        **HARD,
    ),
    _ending(
        "hard time limit, late, `acks_on_failure_or_timeout=False`",
        "body: wait, once",
        {"5.4": Outcome("FAILURE", KILLED), "5.5": Outcome("SUCCESS", KILLED, AGAIN, runs=2)},
        NO_LIMITS,
        gevent={"5.4": Outcome("FAILURE", AT_ONCE, UNACKNOWLEDGED), "5.7": SUCCESS_AGAIN},
        task="end_requeued",
        **HARD,
    ),
]

DEAD = Outcome("FAILURE", NOTICED)
#: 5.3 to 5.6 with billiard 4.3 acknowledge a `SystemExit` and store nothing.
EXITED = {"5.4": "PENDING", "5.7": "FAILURE"}
NO_CALLBACK = Outcome("PENDING", AT_ONCE, DONE)

DEATHS: Sequence[Ending] = [
    _ending(
        "child killed (SIGKILL, out of memory), early acknowledgement",
        "body: wait",
        DEAD,
        NO_CHILDREN,
        play=kill_the_child,
        own_worker=True,
    ),
    _ending(
        "child killed, late acknowledgement",
        "body: wait",
        DEAD,
        NO_CHILDREN,
        play=kill_the_child,
        own_worker=True,
        **LATE,
    ),
    _ending(
        "child killed, late, `reject_on_worker_lost`",
        "body: kill itself, once",
        Outcome("SUCCESS", NOTICED, AGAIN, runs=2),
        NO_CHILDREN,
        own_worker=True,
        task="end_rejecting",
    ),
    _ending(
        "child killed, `retry_on_worker_lost`",
        "body: kill itself, once",
        Outcome("SUCCESS", NOTICED, AGAIN, runs=2),
        NO_CHILDREN,
        own_worker=True,
        task="end_retrying",
        since="5.7",
    ),
    _ending(
        "child killed after its result was stored, `reject_on_worker_lost`",
        "after_return: kill itself, once",
        Outcome("SUCCESS", NOTICED),
        NO_CHILDREN,
        own_worker=True,
        task="end_rejecting",
    ),
    _ending(
        "child killed with its result stored and the lock not given back",
        "before after_return: kill itself, once",
        Outcome("SUCCESS", NOTICED),
        NO_CHILDREN,
        own_worker=True,
        task="end_rejecting",
    ),
    _ending("`os._exit()`", "body: exit", DEAD, NO_CHILDREN, own_worker=True),
    _ending("segmentation fault", "body: crash", DEAD, NO_CHILDREN, own_worker=True),
    _ending(
        "SIGTERM to the child from outside",
        "body: wait",
        FAILURE,
        NO_CHILDREN,
        play=terminate_the_child,
        own_worker=True,
    ),
    _ending(
        "`SystemExit`",
        "body: SystemExit",
        Outcome(EXITED),
        NO_CALLBACK,
        own_worker=True,
    ),
    _ending(
        "`KeyboardInterrupt`",
        "body: KeyboardInterrupt",
        Outcome(EXITED),
        NO_CALLBACK,
        own_worker=True,
    ),
    _ending(
        "`MemoryError`, early acknowledgement (on prefork and solo the worker stops)",
        "body: MemoryError",
        FAILURE,
        play=die_of_memory,
        own_worker=True,
    ),
    _ending(
        "`MemoryError`, late acknowledgement (on prefork and solo the worker stops)",
        "body: MemoryError",
        Outcome("FAILURE", AT_ONCE, BACK),
        Outcome("FAILURE", AT_ONCE, UNACKNOWLEDGED),
        solo=Outcome("FAILURE", AT_ONCE, BACK),
        play=die_of_memory,
        own_worker=True,
        **LATE,
    ),
]

REVOKED = Outcome("REVOKED")

REVOCATIONS: Sequence[Ending] = [
    _ending(
        "`revoke(terminate=True)`",
        "body: wait",
        REVOKED,
        gevent={"5.4": "this pool cannot end single runs before Celery 5.5", "5.5": REVOKED},
        threads="this pool cannot end single runs",
        solo=ONE_THREAD,
        play=revoke_with("SIGTERM"),
        own_worker=True,
    ),
    _ending(
        "`revoke(terminate=True)` that the body survives",
        "body: wait, ignore the end",
        SUCCESS,
        "a `GreenletExit` has no survivors here",
        threads="this pool cannot end single runs",
        solo=ONE_THREAD,
        play=revoke_in_vain,
        own_worker=True,
    ),
    _ending(
        "`revoke(terminate=True)` in a C call that holds the GIL",
        "body: hold the GIL",
        REVOKED,
        ONE_THREAD,
        threads="this pool cannot end single runs",
        play=revoke_with("SIGTERM"),
        own_worker=True,
    ),
    _ending(
        '`revoke(terminate=True, signal="SIGKILL")`',
        "body: wait",
        Outcome("REVOKED", NOTICED),
        NO_CHILDREN,
        play=revoke_with("SIGKILL"),
        own_worker=True,
    ),
    _ending(
        '`revoke(terminate=True, signal="SIGUSR1")`',
        "body: wait",
        Outcome("REVOKED or FAILURE"),
        NO_CHILDREN,
        play=revoke_with("SIGUSR1"),
        own_worker=True,
    ),
    _ending(
        "`revoke(terminate=True)` on a pool that cannot",
        "body: wait",
        "see above",
        "see above",
        threads=SUCCESS,
        solo=ONE_THREAD,
        play=terminate_in_vain,
        own_worker=True,
    ),
    _ending(
        "revoked before its start",
        "body: return",
        Outcome("REVOKED", NEVER_TAKEN, runs=0),
        play=revoke_before_the_start,
    ),
    _ending(
        "expired before its start",
        "body: return",
        Outcome("REVOKED", NEVER_TAKEN, runs=0),
        options={"expires": -1},
    ),
]

#: 5.4 takes a run that a cold shutdown ended for one that failed.
COLD_LATE = {
    "5.4": FAILURE,
    "5.5": Outcome("RETRY", AT_ONCE, BACK),
    "5.6": Outcome("PENDING", AT_ONCE, BACK),
}
COLD_EARLY = {"5.4": FAILURE, "5.5": Outcome("RETRY", AT_ONCE, LOST)}
#: 5.4 ends the process without a word to its greenlets; later ones may end before they have
#: stored what they tell other pools' callers.
COLD_LATE_GREENLETS = {
    "5.4": Outcome("PENDING", BY_TTL, BACK, task="end_late_with_ttl"),
    "5.5": Outcome("PENDING or RETRY", AT_ONCE, LOST),
    "5.6": Outcome("PENDING", AT_ONCE, LOST),
}
COLD_EARLY_GREENLETS = {
    "5.4": Outcome("PENDING", BY_TTL, LOST, task="end_with_ttl"),
    "5.5": Outcome("PENDING or RETRY", AT_ONCE, LOST),
}
#: Celery 5.5 raises an error of its own in the body, and up to 5.6 the worker then goes on.
COLD_SOLO = {"5.4": SUCCESS, "5.5": FAILURE}
#: The only thread of the solo pool sends an early acknowledgement when the body is over.
STILL_UNACKNOWLEDGED = Outcome("PENDING", BY_TTL, BACK)

SHUTDOWNS: Sequence[Ending] = [
    _ending("warm shutdown", "body: wait", SUCCESS, play=shut_down_warm, own_worker=True),
    _ending(
        "cold shutdown, late acknowledgement",
        "body: wait",
        COLD_LATE,
        COLD_LATE_GREENLETS,
        threads=SUCCESS,
        solo=COLD_SOLO,
        play=shut_down_cold,
        own_worker=True,
        **LATE,
    ),
    _ending(
        "cold shutdown, early acknowledgement",
        "body: wait",
        COLD_EARLY,
        COLD_EARLY_GREENLETS,
        threads=SUCCESS,
        solo=COLD_SOLO,
        play=shut_down_cold,
        own_worker=True,
    ),
    _ending(
        "cold shutdown that the body survives",
        "body: wait, ignore the end",
        SUCCESS,
        "see above",
        play=shut_down_cold,
        own_worker=True,
    ),
    _ending(
        "soft shutdown, the body takes longer",
        "body: wait",
        COLD_LATE,
        "as a cold shutdown",
        play=shut_down_cold,
        settings={"worker_soft_shutdown_timeout": 1.0},
        since="5.5",
        **LATE,
    ),
    _ending(
        "soft shutdown, the body is ready in time",
        "body: wait",
        SUCCESS,
        solo=COLD_SOLO,
        play=shut_down_softly,
        settings={"worker_soft_shutdown_timeout": 3.0},
        since="5.5",
        **LATE,
    ),
    _ending(
        "warm shutdown, killed before the body is over, early acknowledgement",
        "body: wait",
        Outcome("PENDING", BY_TTL, LOST),
        solo=STILL_UNACKNOWLEDGED,
        play=kill_the_worker_that_shuts_down,
        own_worker=True,
        task="end_with_ttl",
    ),
    _ending(
        "main process killed (power cut), early acknowledgement",
        "body: wait",
        Outcome("PENDING", BY_TTL, LOST),
        solo=STILL_UNACKNOWLEDGED,
        play=kill_the_worker,
        own_worker=True,
        task="end_with_ttl",
    ),
    _ending(
        "main process killed (power cut), late acknowledgement",
        "body: wait, once",
        Outcome("SUCCESS", BY_TTL, AGAIN, runs=2),
        play=restart_after(kill_the_worker),
        own_worker=True,
        task="end_late_with_ttl",
    ),
    _ending(
        "`max_tasks_per_child`",
        "body: return",
        SUCCESS,
        NO_CHILDREN,
        settings={"worker_max_tasks_per_child": 1},
    ),
    _ending(
        "`max_memory_per_child`",
        "body: return",
        SUCCESS,
        NO_CHILDREN,
        settings={"worker_max_memory_per_child": 1},
    ),
    _ending(
        "`pool_shrink`",
        "body: wait",
        SUCCESS,
        "see prefork",
        play=shrink_the_pool,
        own_worker=True,
    ),
    _ending(
        "`pool_restart`",
        "body: wait",
        SUCCESS,
        "see prefork",
        play=restart_the_pool,
        settings={"worker_pool_restarts": True},
    ),
]

OWN_BROKER = {"own_broker": True}
CANCELS = {**OWN_BROKER, "worker_cancel_long_running_tasks_on_connection_loss": True}
#: One slot: the redelivered copy waits for it.
ONE_SLOT = {"concurrency": 1}

REDELIVERIES: Sequence[Ending] = [
    _ending(
        "broker connection lost, early acknowledgement",
        "body: wait",
        SUCCESS,
        play=lose_the_connection_for_a_while,
        settings=OWN_BROKER,
        solo=SUCCESS,
    ),
    _ending(
        "broker connection lost, late acknowledgement",
        "body: wait",
        SUCCESS,
        play=lose_the_connection_for_a_while,
        settings=OWN_BROKER,
        solo=ONE_THREAD,
        **LATE,
    ),
    _ending(
        "broker connection lost, late, `worker_cancel_long_running_tasks_on_connection_loss`",
        "body: wait, once",
        SUCCESS_AGAIN,
        threads={"5.4": "the worker stops", "5.7": SUCCESS},
        solo=ONE_THREAD,
        gevent={"5.4": "the worker stops", "5.5": SUCCESS_AGAIN},
        play=lose_the_connection_and_the_run,
        settings=CANCELS,
        **LATE,
    ),
    _ending(
        "redelivered (visibility timeout) while it runs",
        "body: wait",
        SUCCESS,
        solo=ONE_THREAD,
        play=redeliver_while_it_runs,
        **LATE,
    ),
    _ending(
        "redelivered while it runs, then its child is killed",
        "body: wait, once",
        Outcome("SUCCESS", NOTICED, AGAIN, runs=2),
        NO_CHILDREN,
        play=redeliver_while_it_dies,
        settings={"concurrency": 2},
        **LATE,
    ),
    _ending(
        "redelivered, and the copy comes when it has succeeded",
        "body: wait",
        SUCCESS,
        play=redeliver_behind_it,
        settings=ONE_SLOT,
        **LATE,
    ),
    _ending(
        "the same with `worker_deduplicate_successful_tasks`",
        "body: wait",
        SUCCESS,
        play=redeliver_behind_it,
        settings={**ONE_SLOT, "worker_deduplicate_successful_tasks": True},
        **LATE,
    ),
]

SPAWN = {"worker_pool_start_method": "spawn"}

SPAWNED: Sequence[Ending] = [
    _ending(
        "it returns, child started by `spawn`",
        "body: return",
        SUCCESS,
        NO_CHILDREN,
        settings=SPAWN,
        since="5.7",
    ),
    _ending(
        "child killed that was started by `spawn`",
        "body: wait",
        DEAD,
        NO_CHILDREN,
        play=kill_the_child,
        settings=SPAWN,
        since="5.7",
    ),
    _ending(
        "hard time limit, child started by `spawn`",
        "body: wait",
        TIMED_OUT,
        NO_CHILDREN,
        options={"time_limit": 1},
        settings=SPAWN,
        since="5.7",
    ),
]

SECTIONS: Mapping[str, Sequence[Ending]] = {
    "The body": BODIES,
    "Hooks": HOOKS,
    "Time limits": LIMITS,
    "Death": DEATHS,
    "Revocation": REVOCATIONS,
    "Shutdown, and the pool's own doings": SHUTDOWNS,
    "Delivered again": REDELIVERIES,
    "Child processes that are spawned": SPAWNED,
}
ENDINGS = [ending for endings in SECTIONS.values() for ending in endings]
