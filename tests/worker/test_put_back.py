"""A run that goes back to its queue comes again as it was (R6)."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from uuid import uuid4

import pytest
from celery import states

from waiting import wait_until
from worker_app import collect, describe, hold, note_error, open_gate, run

OPTIONS = {
    "parent_id": "its parent",
    "root_id": "its root",
    "group_id": "its group",
    "group_index": 3,
    "headers": {"mine": 1},
    "stamp": "a stamp",
    "stamped_headers": ["stamp"],
    "expires": datetime.now(timezone.utc) + timedelta(hours=1),
    "time_limit": 600,
    "soft_time_limit": 500,
    "priority": 5,
    "shadow": "its other name",
    "replaced_task_nesting": 2,
}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "with everything"])
def test_a_run_that_was_put_back_is_told_what_it_would_have_been_told_before(
    worker, history, label, new_label, options
):
    noted, after = new_label(), new_label()
    if options:
        options = {
            **options,
            "link": [run.si(after)],
            "link_error": [note_error.s(noted)],
            "chain": [collect.s()],
        }
    task_id = str(uuid4())
    send = {"args": (label,), "task_id": task_id, "queue": worker.worker_queue, **options}
    described = describe.apply_async(**send).get(timeout=20)

    hold.apply_async((label,), queue=worker.worker_queue)
    history.wait_for_starts(label)
    describe.AsyncResult(task_id).forget()
    result = describe.apply_async(**send)
    wait_until(
        lambda: worker.logs().count(f"[{task_id}] goes back to the queue") >= 2, "it went back"
    )
    open_gate(label)

    assert result.get(timeout=20) == described
    assert described["id"] == task_id
    assert described["parent_id"] == options.get("parent_id")
    assert result.state == states.SUCCESS
