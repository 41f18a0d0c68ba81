"""Aborts a body in a greenlet, and prints what became of it.

Arguments: the library, and "over" if the body has ended when the abort arrives. It is a program of
its own because eventlet minds what its process does.
"""

from __future__ import annotations

import sys
from importlib import import_module

from celery_singleton_lock.aborting import Abort
from celery_singleton_lock.errors import LeaseLostError

library, is_over = import_module(sys.argv[1]), "over" in sys.argv


def body():
    abort = Abort.here()
    abort.fire()
    if is_over:
        abort.disarm()
    try:
        library.sleep(0.1)
        print("undisturbed")
    except LeaseLostError:
        print("stopped")
    finally:
        abort.disarm()


greenlet = library.spawn(body)
(greenlet.get if hasattr(greenlet, "get") else greenlet.wait)()
