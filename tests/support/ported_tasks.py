"""The examples of three other packages' READMEs, as docs/migrating.md spells them; see worker_app.

Where theirs sleep, these wait for the gate of their label, which is an argument that they have.
"""

from __future__ import annotations

from celery import Task

from celery_singleton_lock import SingletonTask
from worker_app import _recorded, _wait_at_gate, task


class OnceTask(SingletonTask):
    """At most one from its publish to its end, as with all three."""

    abstract = True
    lock_phase = "lifetime"


def ported(name, base=OnceTask, **options):
    """One example. Its name is also its lock's, and tells the tests' fixtures whose that is."""
    return task(base=base, bind=True, name=f"worker_app.ported.{name}", **options)


def _run(self, label, outcome=None):
    with _recorded(self, label):
        _wait_at_gate(label)
    return outcome


# celery-singleton --------------------------------------------------------------------------------


@ported("do_stuff")
def do_stuff(self, *args, **kwargs):
    """Its quick start."""
    return _run(self, args[0], "woke up")


@ported("fail_to_do_stuff")
def fail_to_do_stuff(self, label):
    """As ``do_stuff``, with an error at its end."""
    _run(self, label)
    raise ArithmeticError("no stuff")


@ported("do_stuff_with_short_ttl", lock_ttl=1.5)
def do_stuff_with_short_ttl(self, label):
    """As ``do_stuff``, with a ttl that a test can wait for."""
    return _run(self, label)


@ported("do_once_per_user", lock_args="username", on_conflict="skip")
def do_once_per_user(self, username, otherarg=None):
    """Its ``unique_on``."""
    return _run(self, username, otherarg)


@ported("do_something", on_conflict="fail")
def do_something(self, username):
    """Its ``raise_on_duplicate``."""
    return _run(self, username)


@ported("do_once_in_a_while", lock_at_least_for=1.2)
def do_once_in_a_while(self, label):
    """Its ``lock_expiry``, and celery-heimdall's ``unique_wait_for_expiry``."""
    return _run(self, label)


# celery-once -------------------------------------------------------------------------------------


@ported("slow_task", on_conflict="fail")
def slow_task(self, label):
    """Its first example."""
    return _run(self, label, "Done!")


@ported("slow_task_graceful", on_conflict="skip")
def slow_task_graceful(self, label):
    """Its ``graceful``."""
    return _run(self, label, "Done!")


@ported("slow_add", on_conflict="fail")
def slow_add(self, a, b):
    """Without ``keys``."""
    return _run(self, a, b)


@ported("slow_add_by_a", lock_args="a", on_conflict="fail")
def slow_add_by_a(self, a, b):
    """``keys`` with one name."""
    return _run(self, a, b)


@ported("slow_add_alone", lock_args=(), on_conflict="fail")
def slow_add_alone(self, a, b):
    """``keys`` with none."""
    return _run(self, a, b)


@ported("long_running_task", lock_ttl=1, on_conflict="fail")
def long_running_task(self, label):
    """Its ``timeout``, for a body that is longer."""
    return _run(self, label)


@ported("lost_task", lock_reservation_ttl=1, on_conflict="fail")
def lost_task(self, label):
    """Its ``timeout``, for a message that nobody will run."""


@ported("unlock_before_run", base=SingletonTask, lock_phase="queued_and_running")
def unlock_before_run(self, label, is_to_retry=False):
    """Its option of that name."""
    _run(self, label)
    if is_to_retry and not self.request.retries:
        raise self.retry(countdown=1)
    return "Done!"


@ported(
    "unlock_before_run_by_a", base=SingletonTask, lock_phase="queued_and_running", lock_args="a"
)
def unlock_before_run_by_a(self, a, b):
    """The same together with its ``keys``."""
    return _run(self, a, b)


class ContextTask(Task):
    """As in Flask's documentation."""

    def __call__(self, *args, **kwargs):
        """Run the body in an application context."""
        from flask import Flask  # here, since no other test of these workers needs it

        with Flask("shop").app_context():
            return self.run(*args, **kwargs)


class ContextOnceTask(OnceTask, ContextTask):
    """A lock and an application context."""

    abstract = True


@ported("example_task", base=ContextOnceTask, on_conflict="fail")
def example_task(self, label):
    """Its Flask integration: returns the name of the Flask application."""
    from flask import current_app

    return _run(self, label, current_app.name)


# celery-heimdall ---------------------------------------------------------------------------------


@ported("generate_report")
def generate_report(self, customer_id):
    """Its ``unique``."""
    return _run(self, customer_id)


@ported("generate_report_within", time_limit=1)
def generate_report_within(self, customer_id):
    """Its ``unique_timeout``, for a body that is stuck."""
    return _run(self, customer_id)


@ported("generate_report_alone", lock_args=lambda customer_id: "report", on_conflict="skip")
def generate_report_alone(self, customer_id):
    """Its ``key``, a callable."""
    return _run(self, customer_id)


shared_key = {"lock_name": "worker_app.ported.reports", "lock_args": (), "on_conflict": "skip"}


@ported("generate_invoice", **shared_key)
def generate_invoice(self, customer_id):
    """Its ``key``, the same one for several tasks."""
    return _run(self, customer_id)


@ported("generate_statement", **shared_key)
def generate_statement(self, customer_id):
    """As ``generate_invoice``."""
    return _run(self, customer_id)


@ported("generate_report_or_raise", on_conflict="fail")
def generate_report_or_raise(self, customer_id):
    """Its ``unique_raises``."""
    return _run(self, customer_id)
