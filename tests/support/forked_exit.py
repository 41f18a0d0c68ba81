"""A program that forks a child that unwinds; exits 0 if the lock outlived the child.

Usage: ``python forked_exit.py STORE_URL task|by_hand``: the lock of a body, or one taken by hand.
"""

from __future__ import annotations

import os
import sys

from celery import Celery

from celery_singleton_lock import SingletonTask, lock
from celery_singleton_lock.stores import store_from_url

app = Celery("forked_exit", broker="memory://")


@app.task(base=SingletonTask, bind=True, lock_name="worker_app.forked_exit")
def parent(self):
    pid = os.fork()
    if pid == 0:
        raise SystemExit  # through Celery's hooks, which believe that the task has ended
    os.waitpid(pid, 0)
    return store_from_url(app.conf.singleton_store_url, "the test").holder(self.lease.key) is None


def by_hand():
    taken = lock(app, "by_hand")
    with taken:
        pid = os.fork()
        if pid == 0:
            raise SystemExit
        os.waitpid(pid, 0)
        return taken.holder() is None


if __name__ == "__main__":
    app.conf.singleton_store_url = sys.argv[1]
    sys.exit(by_hand() if sys.argv[2] == "by_hand" else parent.apply(throw=True).get())
