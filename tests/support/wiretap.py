"""What clients ask a Redis server, as the server sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import uuid4

import redis


class Command(NamedTuple):
    """One command of a client; what a script calls is none.

    Attributes:
        port: The local port of the client's connection.
        words: The command's name and its arguments.
    """

    port: int
    words: list[str]


class Wiretap(NamedTuple):
    """What was heard.

    Attributes:
        commands: In order; complete when the ``with`` block has ended.
        client: A client of the same server whose own commands are left out.
    """

    commands: list[Command]
    client: redis.Redis


@contextmanager
def wiretap(server: Any) -> Iterator[Wiretap]:
    """Listen to all that clients ask ``server`` while the ``with`` block runs."""
    with server.client() as client, server.client().monitor() as monitor:
        tap = Wiretap([], client)
        first_word, last_word = uuid4().hex, uuid4().hex
        client.echo(first_word)
        heard = _next(monitor)
        while heard.words[-1] != first_word:
            heard = _next(monitor)
        own_port = heard.port
        try:
            yield tap
        finally:
            client.echo(last_word)
            while (heard := _next(monitor)).words[-1] != last_word:
                if heard.port not in (own_port, 0):
                    tap.commands.append(heard)


def _next(monitor: Any) -> Command:
    heard = monitor.next_command()
    # What a script calls comes from no port.
    return Command(int(heard["client_port"] or 0), heard["command"].split(" "))
