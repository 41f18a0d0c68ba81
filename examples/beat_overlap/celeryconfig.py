"""Celery's settings for beat and the workers.

Celery reads this when the app is first used. By then the command has started a server and
written where it is into its environment, which the processes that it starts inherit.
"""

import os

from .ways import PARTS

# Begins every key and channel in Redis, so that nobody else on a shared server is met. The locks
# are in the broker's Redis, where no other place is set, and begin with it too.
_prefix = os.environ.get("BEAT_OVERLAP_KEY_PREFIX", "beat-overlap:")

broker_url = os.environ.get("BEAT_OVERLAP_URL", "redis://localhost:6379/0")
broker_transport_options = {"global_keyprefix": _prefix}

beat_schedule = {
    way.queue: way.entry() for way in PARTS[os.environ.get("BEAT_OVERLAP_PART", "overlap")]
}
task_ignore_result = True
# What waits, waits in the queue, where it is counted and where every worker can take it.
worker_prefetch_multiplier = 1
