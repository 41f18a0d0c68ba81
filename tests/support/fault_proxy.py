"""A Redis that fails when it is told to: a TCP proxy on loopback, in front of a real one."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Collection, Coroutine
from contextlib import suppress
from typing import Any

#: What a client says while it connects; a server that refuses all else answers these.
GREETING = {"HELLO", "AUTH", "CLIENT", "SELECT"}
#: What a store asks with.
SCRIPTS = {"EVALSHA", "EVAL"}
#: A close with this is a reset.
AT_ONCE = struct.pack("ii", 1, 0)


class FaultProxy:
    """Passes everything on, until one of its methods says otherwise; ``heal`` ends that.

    Args:
        port: The loopback port of the real server.

    Attributes:
        port: Its own.
        asked: The names of the commands that have arrived, those of the greeting left out.
        held: How many commands wait for a freeze to end.
    """

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        self.held = 0
        self._upstream = port
        self._fault, self._error = "none", b""
        self._lost: Collection[str] = SCRIPTS
        self._links: set[asyncio.StreamWriter] = set()
        # Bound and not listening: nobody else gets the port while connections are refused.
        self._reserved = _bound(0)
        self.port: int = self._reserved.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.heal()

    def url(self, database: int = 0) -> str:
        """The address that a client is given."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def heal(self) -> None:
        """Pass everything on."""
        self._set("none")

    def refuse(self) -> None:
        """Refuse connections, and end those that there are."""
        self._set("refuse")

    def freeze(self) -> None:
        """Take commands and say nothing. Who still waits when this ends meets what comes next."""
        self._set("freeze")

    def cut(self) -> None:
        """Reset each connection at its next command, which is not carried out."""
        self._set("cut")

    def lose_replies(self, once: bool = False, names: Collection[str] = SCRIPTS) -> None:
        """Have commands of these names carried out, and close the connection for a reply.

        ``once``: refuse all else from the first one on.
        """
        self._lost = names
        self._set("lose once" if once else "lose")

    def answer(self, error: str) -> None:
        """Answer each command with this error, and carry out none."""
        self._set("answer", error)

    def stop(self) -> None:
        """End it, with all connections."""
        self._set("refuse")
        self._run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def _set(self, fault: str, error: str = "") -> None:
        self._run(self._change(fault, b"-%s\r\n" % error.encode()))

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _change(self, fault: str, error: bytes) -> None:
        self._fault, self._error = fault, error
        if fault == "refuse":
            if self._server:
                # What asyncio has just accepted when its server is closed it never closes.
                for listening in self._server.sockets:
                    self._loop.remove_reader(listening.fileno())
                await _take_turns()
                self._server.close()
                self._server = None
            for link in list(self._links):
                link.transport.abort()
        elif self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=_bound(self.port))
        self._changed.set()
        self._changed = asyncio.Event()

    async def _cancel_all(self) -> None:
        for link in list(self._links):
            link.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await _take_turns()  # what is aborted closes its socket some turns later

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._links.add(client)
        try:
            with suppress(OSError):
                await self._relay(reader, client)
        finally:
            self._end(client)

    async def _relay(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection("127.0.0.1", self._upstream)
        loses = asyncio.Event()
        replies = asyncio.create_task(self._pass_replies(answers, client, loses))
        try:
            while True:
                command, name = await _next_command(reader)
                if name not in GREETING:
                    self.asked.append(name)
                if self._fault == "freeze":
                    await self._hold()
                    if reader.at_eof():
                        return
                if self._fault == "cut":
                    client.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE
                    )
                    return
                if self._fault == "answer" and name not in GREETING:
                    client.write(self._error)
                    continue
                if self._fault.startswith("lose") and name in self._lost:
                    loses.set()
                server.write(command)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._end(client)
            if not loses.is_set():  # else what was sent last is still to be carried out
                replies.cancel()
            with suppress(asyncio.CancelledError):
                await replies
            server.transport.abort()

    async def _hold(self) -> None:
        self.held += 1
        while self._fault == "freeze":
            await self._changed.wait()
        self.held -= 1

    async def _pass_replies(
        self, answers: asyncio.StreamReader, client: asyncio.StreamWriter, loses: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while (data := await answers.read(65536)) and not loses.is_set():
                client.write(data)
            if self._fault == "lose once" and loses.is_set():
                await self._change("refuse", b"")
        self._end(client)

    def _end(self, client: asyncio.StreamWriter) -> None:
        self._links.discard(client)
        client.transport.abort()


async def _take_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def _next_command(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    head = await reader.readuntil(b"\r\n")
    words, raw = [], [head]
    for _ in range(int(head[1:])):
        size = await reader.readuntil(b"\r\n")
        word = await reader.readexactly(int(size[1:]) + 2)
        words.append(word)
        raw += [size, word]
    return b"".join(raw), words[0].strip().decode().upper()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound
