"""What the worker's main process sees of a run."""

from __future__ import annotations

from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery.worker.request import Request

from .results import Skipped


class SingletonRequest(Request):
    """Celery's request, which also tells monitors of a skipped run."""

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Celery's hook for every ending that is not a return, ``Ignore`` included."""
        result = super().on_failure(exc_info, *args, **kwargs)
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Skipped):
            # After Ignore, Flower would show STARTED for ever: it reads events only.
            self.send_event("task-revoked", terminated=False, signum=None, expired=False)
        return result
