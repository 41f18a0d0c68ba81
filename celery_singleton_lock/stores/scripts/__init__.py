"""The Lua scripts of the Redis store, one operation each."""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files
from typing import NamedTuple


class Script(NamedTuple):
    """A script's source and the name under which Redis keeps it.

    Attributes:
        source: Lua text.
        sha: What EVALSHA takes.
    """

    source: str
    sha: str


def load_script(name: str) -> Script:
    """Read ``name``.lua from this package; works from a zip file too."""
    source = files(__package__).joinpath(f"{name}.lua").read_text("utf-8")
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())
