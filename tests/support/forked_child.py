"""A program that forks while it holds a lock; its child takes one of its own.

Usage: ``python forked_child.py STORE_URL``. The lock names are ``worker_app.parent`` and
``worker_app.child``; each is held for several renewals.
"""

from __future__ import annotations

import os
import sys
import time

from celery import Celery

from celery_singleton_lock import SingletonTask

TTL = 0.6
HELD_FOR = 2.5 * TTL

app = Celery("forked_child", broker="memory://")
app.conf.singleton_lock_ttl = TTL


@app.task(base=SingletonTask, bind=True, lock_name="worker_app.parent")
def parent(self):
    time.sleep(TTL / 2)  # until the renewal thread is at work, with a connection
    pid = os.fork()
    if pid == 0:
        # Not sys.exit(), which would unwind the parent's task in the child.
        os._exit(0 if child.apply().successful() else 1)
    time.sleep(HELD_FOR)
    self.lease.check()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@app.task(base=SingletonTask, bind=True, lock_name="worker_app.child")
def child(self):
    time.sleep(HELD_FOR)
    self.lease.check()


if __name__ == "__main__":
    app.conf.singleton_store_url = sys.argv[1]
    sys.exit(parent.apply(throw=True).get())
