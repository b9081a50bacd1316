"""One runner and the workspace it serves: started, asked, killed and started again."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox.base import KilledBy, SandboxBroken
from sandbox.isolation import Launch
from sandbox.treefiles import TreeFiles, delete
from sandbox.workspace import Workspace

START_S = 60.0
GRACE_S = 3.0  # what the runner has, past a deadline, to say so
MAX_ANSWER_BYTES = 64 << 20


class Slot(abc.ABC):
    """A runner and its workspace, wherever they are.

    Attributes:
      facts: what the runner said of itself when it started.
      untidy: whether a command may have left temporary files.
      broken: why the slot is of no use any more; "" while it is.
      keeps_files: whether the workspace outlives its runner.
    """

    keeps_files = True
    workspace: Workspace

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.untidy = False
        self.broken = ""

    @property
    @abc.abstractmethod
    def running(self) -> bool: ...

    @abc.abstractmethod
    async def start(self) -> None:
        """Start the runner and wait until it serves; SandboxBroken if it does not come up."""

    @abc.abstractmethod
    async def stop(self) -> KilledBy | None:
        """Kill the runner and everything it started; returns when they are gone.

        Tells what had ended it already, if that is known."""

    @abc.abstractmethod
    async def _send(self, data: bytes) -> None: ...

    @abc.abstractmethod
    async def _receive(self, count: int) -> bytes: ...

    async def ask(
        self, message: Mapping[str, Any], timeout_s: float, payload: bytes = b""
    ) -> dict[str, Any] | None:
        """One request and its answer; None if it did not come in time, or at all, or was none.

        After None, as after a cancelled call, the runner and all it ran are gone. Raises
        SandboxBroken if the slot is, too.
        """
        body = json.dumps(message).encode()
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(struct.pack(">I", len(body)) + body + payload)
                (size,) = struct.unpack(">I", await self._receive(4))
                if size > MAX_ANSWER_BYTES:
                    raise ValueError("answer too large")
                answer = json.loads(await self._receive(size))
                if not isinstance(answer, dict):
                    raise ValueError("answer is no object")
                return answer
        except (OSError, EOFError, ValueError, RecursionError):  # TimeoutError is an OSError
            self.ended_by = await self.stop()
            if self.broken:
                raise SandboxBroken(self.broken) from None
            return None
        except asyncio.CancelledError:
            await self.stop()
            raise

    ended_by: KilledBy | None = None


class ProcessSlot(Slot):
    """A runner on this machine, started as `launch` says, with its workspace in `folder`, which is
    there and empty.

    `uid`: the user it runs as (None: as us).
    """

    def __init__(self, folder: Path, uid: int | None, launch: Launch) -> None:
        super().__init__()
        self.folder = folder
        (folder / "work").mkdir(mode=0o755)
        self.workspace = Workspace(TreeFiles(str(folder / "work"), uid))
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def running(self) -> bool:
        return self._channel is not None

    async def start(self) -> None:
        if (temporary := self.folder / "tmp").exists():  # not the namespace's, so it outlives it
            delete(*(temporary / name for name in os.listdir(temporary)))
        ours, theirs = socket.socketpair()
        files: dict[str, int] = {}
        try:
            for name, contents in self._launch.files.items():
                files[name] = os.memfd_create(name)
                os.write(files[name], contents)
                os.lseek(files[name], 0, os.SEEK_SET)
            numbers = {f"{{{name}}}": str(fd) for name, fd in files.items()}
            argv = [numbers.get(part, part) for part in self._launch.argv]
            with open(self.folder / "log", "wb") as log:
                # from this thread, not a worker: the runner dies with the thread that started it
                self._process = subprocess.Popen(
                    argv,
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=log,
                    # what it runs gets the path too, itself it finds its parts without
                    env={**self._launch.environment, "PYTHONPATH": ""},
                    pass_fds=tuple(files.values()),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise SandboxBroken(f"cannot start {self._launch.argv[0]}: {error}") from None
        finally:
            theirs.close()
            for fd in files.values():
                os.close(fd)
        ours.setblocking(False)
        self._channel = ours
        facts = await self.ask(self._launch.setup, START_S)
        if facts is None:
            raise SandboxBroken(f"the sandbox's runner does not start: {self._last_words()}")
        self.facts = facts

    async def _send(self, data: bytes) -> None:
        assert self._channel is not None
        await asyncio.get_running_loop().sock_sendall(self._channel, data)

    async def _receive(self, count: int) -> bytes:
        assert self._channel is not None
        loop = asyncio.get_running_loop()
        parts = bytearray()
        while len(parts) < count:
            chunk = await loop.sock_recv(self._channel, min(count - len(parts), 1 << 20))
            if not chunk:
                raise EOFError
            parts += chunk
        return bytes(parts)

    async def stop(self) -> KilledBy | None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        process, self._process = self._process, None
        if process is not None:
            # shielded: whatever happens to the caller, nothing may run on
            await asyncio.shield(asyncio.to_thread(end, process))
        return None

    def stop_now(self) -> None:
        """As `stop`, for when there is no event loop any more."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            end(self._process)
            self._process = None

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
            return lines[-1][:300] if lines else "it said nothing"
        return "it said nothing"


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a runner, whose channel was closed, and wait until it and all it started are gone.

    It ends by itself at the end of its input, unless it is stopped or stuck. Then its kin is killed
    from the top: process 1 of a namespace takes all others along, and `bwrap` ends after it.
    """
    for patience_s in (0.5, 0.5, 1.0, 5.0):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def descendants(pid: int, at_most: int = 4096) -> list[int]:
    """All processes below `pid`, parents first."""
    found = [pid]
    for parent in found:  # grows as it is walked
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    found += [int(child) for child in file.read().split()]
        if len(found) > at_most:
            break
    return found[1:]
