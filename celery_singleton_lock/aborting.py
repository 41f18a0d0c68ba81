"""Stop a body from outside: what ``on_lease_lost="abort"`` does.

How far it reaches depends on where the body runs:

========================= ======================================================================
the main thread           SIGUSR1, the signal of Celery's soft time limit: ends a wait (``sleep``,
(prefork, solo)           ``recv``) too
another thread (threads)  an asynchronous exception: raised when the body next executes Python,
                          so not within a call that waits
a greenlet                thrown where the body waits: it does so whenever another one runs
(gevent, eventlet)
========================= ======================================================================

A call that holds the GIL is stopped by none of them. A body that catches the error goes on. One
that has returned, and whose result is being stored, is left alone.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from .errors import LeaseLostError

_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none


class Abort(ABC):
    """Raises ``LeaseLostError``, once, in the body that runs where this was made.

    Args:
        body: Its code, to tell it from what Celery runs before and after it; ``None`` if it has
            none that could be seen.
    """

    def __init__(self, body: CodeType | None) -> None:
        self._body = body
        self._is_fired = False
        self._is_over = False
        self._mutex = threading.Lock()

    @classmethod
    def here(cls, body: CodeType | None = None) -> Abort:
        """For the body that is about to run in this thread or greenlet."""
        schedule = _greenlet_scheduler()
        if schedule is not None:
            return _GreenletAbort(body, schedule)
        is_in_main_thread = threading.current_thread() is threading.main_thread()
        # Only in front of a handler of Celery's: the default one would end the process.
        if is_in_main_thread and _SIGNAL and callable(signal.getsignal(_SIGNAL)):
            return _SignalAbort(body, _SIGNAL)
        return _ThreadAbort(body)

    def fire(self) -> None:
        """Stop the body, from whatever thread this is called in."""
        with self._mutex:
            if not (self._is_fired or self._is_over):
                self._is_fired = True
                self._raise_in_body()

    def disarm(self) -> None:
        """The body is over. To be called where it ran; nothing is raised there from now on."""
        for _ in range(2):  # what was fired just now may come up here, but once only
            try:
                self._is_over = True
                with self._mutex:
                    self._call_off()
                return
            except LeaseLostError:
                continue

    def _is_in_body(self, frame: FrameType | None) -> bool:
        while self._body is not None and frame is not None and frame.f_code is not self._body:
            frame = frame.f_back
        return frame is not None

    @abstractmethod
    def _raise_in_body(self) -> None: ...

    @abstractmethod
    def _call_off(self) -> None: ...


class _SignalAbort(Abort):
    def __init__(self, body: CodeType | None, number: int) -> None:
        super().__init__(body)
        self._number = number
        self._is_pending = False
        self._next_handler: Any = signal.signal(number, self._handle)

    def _raise_in_body(self) -> None:
        self._is_pending = True
        signal.pthread_kill(threading.main_thread().ident or 0, self._number)

    def _call_off(self) -> None:
        signal.signal(self._number, self._next_handler)  # what is pending is handled first

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_pending:
            self._next_handler(number, frame)
            return
        self._is_pending = False
        if self._is_in_body(frame):
            raise LeaseLostError


class _ThreadAbort(Abort):
    def __init__(self, body: CodeType | None) -> None:
        super().__init__(body)
        self._thread = threading.get_ident()

    def _raise_in_body(self) -> None:
        if self._is_in_body(sys._current_frames().get(self._thread)):
            self._set(ctypes.py_object(LeaseLostError))

    def _call_off(self) -> None:
        self._set(None)

    def _set(self, error: Any) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), error)


class _GreenletAbort(Abort):
    def __init__(
        self, body: CodeType | None, schedule: Callable[[Callable[[], None]], object]
    ) -> None:
        super().__init__(body)
        self._schedule = schedule
        self._greenlet = _current_greenlet()

    def _raise_in_body(self) -> None:
        self._schedule(self._throw)

    def _call_off(self) -> None:
        """Nothing to do: what is scheduled looks first."""

    def _throw(self) -> None:
        if not self._is_over and self._is_in_body(self._greenlet.gr_frame):
            self._greenlet.throw(LeaseLostError)


def _current_greenlet() -> Any:
    greenlet = sys.modules.get("greenlet")
    return None if greenlet is None else greenlet.getcurrent()


def _greenlet_scheduler() -> Callable[[Callable[[], None]], object] | None:
    """How to call something in the hub of the greenlet that runs here, if it is one's."""
    hub_greenlet = getattr(_current_greenlet(), "parent", None)
    if hub_greenlet is None:
        return None
    if "gevent" in sys.modules:
        import gevent

        hub = gevent.get_hub()
        if hub is hub_greenlet:
            return hub.loop.run_callback  # type: ignore[no-any-return]
    if "eventlet" in sys.modules:
        from eventlet import hubs

        hub = hubs.get_hub()
        if hub.greenlet is hub_greenlet:
            return lambda call: hub.schedule_call_global(0, call)
    return None
