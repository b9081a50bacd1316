"""A runner in a container, spoken to over its attached input and output."""

from __future__ import annotations

import asyncio
import contextlib
import struct

from sandbox.base import KilledBy, SandboxBroken
from sandbox.docker import Engine
from sandbox.remote_files import RemoteFiles
from sandbox.slot import START_S, Slot
from sandbox.workspace import Workspace

MAX_WORDS = 4000


class ContainerSlot(Slot):
    """A container of `engine`, made anew whenever the runner is started."""

    keeps_files = False

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.container = ""
        self._abandoned = False
        self._files = RemoteFiles(self, lambda: self._loop)
        self.workspace = Workspace(self._files)
        self._stream: Attached | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def running(self) -> bool:
        return self._stream is not None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._files.forget()
        try:
            self.container = await asyncio.to_thread(self.engine.create)
            self._stream = await Attached.open(self.engine, self.container)
            await asyncio.to_thread(self.engine.start, self.container)
        except BaseException as error:
            self.broken = str(error) or type(error).__name__
            await self.stop()
            raise
        stream = self._stream
        facts = await self.ask(self.engine.setup(), START_S)
        if facts is None:
            self.broken = f"{self.engine.name}: no runner: {stream.words() or 'it said nothing'}"
            raise SandboxBroken(self.broken)
        if not facts["shielded"]:  # it could write the report of its own tests
            runtime = self.engine.container.runtime or "its runtime"
            self.broken = f"{self.engine.name}: {runtime} lets tests into the runner beside them"
            await self.stop()
            raise SandboxBroken(self.broken)
        self.facts = facts

    def abandon(self, why: str) -> None:
        """The engine is gone, or does not answer: whoever waits for the runner hears of it now."""
        self.broken, self._abandoned = why, True
        if self._stream is not None:
            self._stream.close()

    async def stop(self) -> KilledBy | None:
        stream, self._stream = self._stream, None
        container, self.container = self.container, ""
        if stream is not None:
            stream.close()
        if not container or self._abandoned:  # swept when the engine is back
            return None
        # shielded: whatever happens to the caller, nothing may run on
        return await asyncio.shield(asyncio.to_thread(self._remove, container))

    def _remove(self, container: str) -> KilledBy | None:
        ended_by: KilledBy | None = "memory" if self.engine.out_of_memory(container) else None
        try:
            self.engine.remove(container)
        except SandboxBroken as error:
            self.broken = str(error)
        return ended_by

    async def _send(self, data: bytes) -> None:
        if self._stream is None:
            raise EOFError
        await self._stream.send(data)

    async def _receive(self, count: int) -> bytes:
        if self._stream is None:
            raise EOFError
        return await self._stream.receive(count)


class Attached:
    """The streams of a container, as the engine joins them into one (API `attach`, no terminal):
    frames of a byte for which one, three of nothing, a 4-byte big-endian length, and the data."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._out, self._err = bytearray(), bytearray()

    @classmethod
    async def open(cls, engine: Engine, container: str) -> Attached:
        """Attach to a container that is not started yet. Raises SandboxBroken."""
        place, port, tls = engine.endpoint()
        try:
            if port:
                reader, writer = await asyncio.open_connection(place, port, ssl=tls)
            else:
                reader, writer = await asyncio.open_unix_connection(place)
            query = "stream=1&stdin=1&stdout=1&stderr=1"
            writer.write(
                f"POST /containers/{container}/attach?{query} HTTP/1.1\r\nHost: docker\r\n"
                "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise SandboxBroken(f"{engine.name}: cannot attach: {error}") from None
        status = head.split(b" ", 2)[1]
        if status not in (b"101", b"200"):
            writer.close()
            raise SandboxBroken(f"{engine.name}: cannot attach: status {status.decode()}")
        return cls(reader, writer)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self, count: int) -> bytes:
        """Exactly `count` bytes of its output; EOFError (or OSError) at its end."""
        while len(self._out) < count:
            which, size = struct.unpack(">BxxxI", await self._reader.readexactly(8))
            data = await self._reader.readexactly(size)
            if which == 1:
                self._out += data
            else:
                self._err = (self._err + data)[-MAX_WORDS:]
        taken = bytes(self._out[:count])
        del self._out[:count]
        return taken

    def words(self) -> str:
        """The last line of what it said on standard error."""
        return self._err.decode(errors="replace").strip().rpartition("\n")[2][:300]

    def close(self) -> None:
        with contextlib.suppress(Exception):  # its loop may be closed
            self._writer.transport.abort()
