"""Celery's settings for the sale, workers and buyers alike.

Celery reads this when the app is first used. By then the command has started the servers and
written where they are into its environment, which its workers inherit.
"""

import os

# Begins every key and channel in Redis, so that a sale on a shared server meets nobody else's.
_prefix = os.environ.get("FLASH_SALE_KEY_PREFIX", "flash-sale:")

broker_url = os.environ.get("FLASH_SALE_URL", "redis://localhost:6379/0")
broker_transport_options = {"global_keyprefix": _prefix}

singleton_store_url = os.environ.get("FLASH_SALE_LOCK_URL", broker_url)
singleton_key_prefix = _prefix

task_default_queue = "buyers"
task_ignore_result = True
# A buyer who waits for the lock in a slot must not keep others waiting behind that slot.
worker_prefetch_multiplier = 1
