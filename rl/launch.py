"""Starting a server: the command for a chip, a process here, or a command that restarts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from configs.errors import InputError
from rl.snapshot import Snapshot

Kind = Literal["sglang", "sglang-jax"]
Chip = Literal["cpu", "cuda", "tpu"]

SHIM = Path(__file__).with_name("sglang_cpu.py")
GUARD = Path(__file__).with_name("guard.py")
_STOP_S = 15.0


@dataclass(frozen=True)
class Launch:
    """What a server is started with.

    Attributes:
      python: interpreter of the environment that has it. It cannot be remend's own: SGLang pins
        other versions of half of the packages.
      tokens: that fit its cache of keys and values, over all running requests; 0: as it likes.
      flags: more flags, behind all others.
    """

    kind: Kind
    chip: Chip
    python: str
    snapshot: Path
    label: str
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: str = "float32"
    requests: int = 32
    tokens: int = 0
    flags: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The command line. Raises InputError for a chip that this kind does not run on."""
        model = ["--model-path", str(self.snapshot.absolute())]
        where = ["--host", self.host, "--port", str(self.port), "--dtype", self.dtype]
        load = ["--max-running-requests", str(self.requests)]
        if self.tokens:
            load += ["--max-total-tokens", str(self.tokens)]
        if self.kind == "sglang-jax":
            if self.chip == "cuda":
                raise InputError("sglang-jax runs on tpu and cpu: use sglang for cuda")
            device = ["--device", self.chip, "--skip-server-warmup"]
            if self.chip == "cpu":  # its kernels for attention are TPU's
                device += ["--attention-backend", "native", "--disable-precompile"]
            start = [self.python, "-m", "sgl_jax.launch_server"]
            return [*start, *model, *where, *load, *device, *self.flags]
        if self.chip == "tpu":
            raise InputError("SGLang does not run on tpu: use sglang-jax")
        version = ["--weight-version", self.label]
        if self.chip == "cuda":
            start = [self.python, "-m", "sglang.launch_server"]
            return [*start, *model, *where, *load, *version, *self.flags]
        start = [self.python, "-P", str(SHIM), "server"]
        plain = "--device cpu --attention-backend torch_native --sampling-backend pytorch"
        plain += " --disable-overlap-schedule --grammar-backend none"
        return [*start, *model, *where, *load, *version, *plain.split(), *self.flags]


class Launcher(Protocol):
    """Something that can start one server of a fleet anew."""

    def alive(self) -> bool: ...

    async def restart(self, snapshot: Snapshot) -> None:
        """Stop what runs, start it with the snapshot; returns before it is ready to serve."""
        ...

    async def stop(self) -> None: ...


class LocalProcess:
    """A server process of our own, in its own process group, which ends with this process however
    that ends; its output goes to `log`."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self._launch, self._log = launch, log
        self._process: asyncio.subprocess.Process | None = None

    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def restart(self, snapshot: Snapshot) -> None:
        await self.stop()
        launch = replace(self._launch, snapshot=snapshot.folder, label=snapshot.label)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", str(GUARD), *launch.command()),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise InputError(f"cannot start a server: {error.strerror}") from None

    async def stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)  # its workers too, also when it is gone itself
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
                    await _group_gone(process.pid)


class RestartCommand:
    """A command that restarts one server, wherever it runs; returns once it is under way.

    In its words {url}, {snapshot} and {label} are replaced. No shell reads it.
    """

    def __init__(self, command: str, url: str) -> None:
        self._words, self._url = shlex.split(command), url

    def alive(self) -> bool:
        return True  # who watches it there starts it again

    async def restart(self, snapshot: Snapshot) -> None:
        facts = {
            "{url}": self._url,
            "{snapshot}": str(snapshot.folder.absolute()),
            "{label}": snapshot.label,
        }
        words = [_filled(word, facts) for word in self._words]
        try:
            process = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.DEVNULL)
        except OSError as error:
            raise InputError(f"server.sglang.restart: {words[0]}: {error.strerror}") from None
        if await process.wait():
            raise InputError(f"server.sglang.restart: {shlex.join(words)} failed")

    async def stop(self) -> None:
        pass  # it was not started by this run


def chip_here() -> Chip:
    """What this machine has to serve with."""
    if Path("/dev/nvidia0").exists():
        return "cuda"
    tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio/0").exists()
    return "tpu" if tpu else "cpu"


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def interpreter(python: str, kind: Kind) -> str:
    """The Python to start a server with. Raises InputError where there is none to be found."""
    if python:
        if not Path(python).exists():
            raise InputError(f"server.sglang.python: {python} does not exist")
        return python
    from importlib.util import find_spec

    if find_spec("sglang" if kind == "sglang" else "sgl_jax") is not None:
        return sys.executable
    raise InputError(
        f"{kind} is not installed here: make an environment for it (docs/serving.md) and set "
        "server.sglang.python, or --python, to its interpreter"
    )


async def _group_gone(group: int) -> None:
    while True:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        await asyncio.sleep(0.05)


def _filled(word: str, facts: dict[str, str]) -> str:
    for name, value in facts.items():
        word = word.replace(name, value)
    return word


def router_command(python: str, urls: Sequence[str], port: int) -> list[str]:
    """SGLang's router in front of servers, each episode kept on one of them."""
    policy = ["--policy", "manual", "--host", "127.0.0.1", "--port", str(port)]
    return [python, "-P", str(SHIM), "router", "--worker-urls", *urls, *policy]
