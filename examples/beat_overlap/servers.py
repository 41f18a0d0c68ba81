"""Which Redis the example uses."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from fleet import own_keys
from redis_server import RedisServer, given_url


@contextmanager
def server() -> Iterator[str]:
    """The server that the environment names, else a private one; gives the prefix of all keys.

    Tells this process and all that it starts where it is. Removes the private server, or all
    keys of the example, in the end.
    """
    prefix = f"beat-overlap-{secrets.token_hex(4)}:"
    url = given_url()
    if url is None:
        with RedisServer() as private:
            _announce(private.url(), prefix)
            yield prefix
        return
    with own_keys(url, prefix):
        _announce(url, prefix)
        yield prefix


def _announce(url: str, prefix: str) -> None:
    os.environ["BEAT_OVERLAP_URL"] = url
    os.environ["BEAT_OVERLAP_KEY_PREFIX"] = prefix
