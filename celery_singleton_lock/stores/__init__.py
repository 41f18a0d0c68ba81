"""Where locks live: one class per kind of store, found by the scheme of its URL."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from ..errors import ConfigurationError
from .base import LockStore

#: URL scheme → (module, class), imported on demand.
STORES = {
    "redis": ("redis", "RedisStore"),
    "rediss": ("redis", "RedisStore"),
    "unix": ("redis", "RedisStore"),
    "redis+socket": ("redis", "RedisStore"),
    "memory": ("memory", "MemoryStore"),
}


def store_from_url(url: str, origin: str) -> LockStore:
    """The store at ``url``; nothing is connected yet.

    Args:
        url: Its scheme chooses the class: see :data:`STORES`.
        origin: The setting that the URL is from, for error messages.

    Raises:
        ConfigurationError: The URL makes no sense. It is not quoted: it may hold a password.
    """
    scheme, separator, _ = str(url).partition("://")
    if not separator or scheme not in STORES:
        raise ConfigurationError(
            f"{origin} must be a URL that starts with one of "
            f"{', '.join(f'{known}://' for known in STORES)}"
            + (f", not with {scheme}://" if separator else "")
        )
    module, name = STORES[scheme]
    store_class = getattr(import_module(f".{module}", __name__), name)
    try:
        return cast(LockStore, store_class.from_url(url))
    except (ValueError, TypeError):
        # Their messages can quote the password, and so can a chained traceback.
        raise ConfigurationError(
            f"{origin} cannot be read as a {scheme}:// URL: look at its port, its database number "
            "and the options behind '?', and percent-encode special characters in the password"
        ) from None
