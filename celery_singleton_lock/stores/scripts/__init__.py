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


def load_script(*names: str, **constants: int) -> Script:
    """Read these .lua files from this package as one script; works from a zip file too."""
    parts = [f"local {name} = {value}\n" for name, value in constants.items()]
    parts += [files(__package__).joinpath(f"{name}.lua").read_text("utf-8") for name in names]
    source = "".join(parts)
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())
