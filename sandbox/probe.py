"""What each backend contains on this machine, found by trying to break out of it."""

from __future__ import annotations

import secrets
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from sandbox.backends import make_pool
from sandbox.base import Limits, Sandbox, SandboxBroken, Tree
from sandbox.docker import ContainerConfig, DockerHost

LIMITS = Limits(memory_mib=256, processes=24, wall_s=5.0, output_bytes=65536, file_mib=16)


@dataclass(frozen=True)
class Check:
    """One thing that a sandbox must not let through, and what was seen."""

    name: str
    contained: bool
    seen: str


async def check(
    hosts: Sequence[DockerHost] = (), container: ContainerConfig | None = None
) -> dict[str, Any]:
    """Try every backend, docker on the first of `hosts`.

    `{"backends": {NAME: {"checks": […]} | {"unavailable": why}}, "auto": …, "contained": whether
    the backend that "auto" takes contains everything}`.
    """
    backends: dict[str, dict[str, Any]] = {}
    names = ("bwrap", "plain", "docker")
    for name in names:
        try:
            checks = await check_backend(name, hosts, container)
        except (SandboxBroken, InputError) as error:
            backends[name] = {"unavailable": str(error)}
        except ModuleNotFoundError as error:
            backends[name] = {"unavailable": f"{error.name} is not installed"}
        else:
            backends[name] = {"checks": [asdict(item) for item in checks]}
    working = [name for name in ("bwrap", "plain") if "checks" in backends[name]]
    auto = working[0] if working else None
    contained = auto is not None and all(c["contained"] for c in backends[auto]["checks"])
    return {"backends": backends, "auto": auto, "contained": contained}


async def check_backend(
    backend: str, hosts: Sequence[DockerHost] = (), container: ContainerConfig | None = None
) -> list[Check]:
    """Every check on one backend; SandboxBroken or InputError if it does not work here."""
    with tempfile.TemporaryDirectory(prefix="remend-check-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # what protects it shall be the sandbox
        tree = folder / "tree"
        tree.mkdir()
        # no warning: what the plain backend lets through is what we are about to tell
        async with make_pool(backend, 1, LIMITS, hosts, container, warn=lambda text: None) as pool:
            async with pool.lease(Tree(tree)) as sandbox:
                return [await attempt(sandbox, folder) for attempt in _ATTEMPTS]


Attempt = Callable[[Sandbox, Path], Awaitable[Check]]


async def _network(sandbox: Sandbox, folder: Path) -> Check:
    """Reach a server of ours on the loopback device."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('in')"
        result = await sandbox.exec(["python3", "-c", code])
    return Check("network", "in" not in result.stdout, _last(result.stderr) or "connected")


async def _reading(sandbox: Sandbox, folder: Path) -> Check:
    secret = secrets.token_hex(8)
    (folder / "secret").write_text(secret)
    result = await sandbox.exec(["cat", str(folder / "secret")])
    return Check("reading outside", secret not in result.stdout, _last(result.stderr) or "read it")


async def _writing(sandbox: Sandbox, folder: Path) -> Check:
    target = folder / "open"
    target.mkdir()
    target.chmod(0o777)
    result = await sandbox.exec(["sh", "-c", f"echo x > {target}/planted"])
    planted = (target / "planted").exists()
    return Check("writing outside", not planted, _last(result.stderr) or "wrote a file")


async def _environment(sandbox: Sandbox, folder: Path) -> Check:
    """The environments of the machine's processes, and with them what the harness was told."""
    code = (
        "import glob, os\n"
        "seen = 0\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: seen += f'/{os.getpid()}/' not in path and len(open(path, 'rb').read()) > 0\n"
        "    except OSError: pass\n"
        "print(seen)"
    )
    result = await sandbox.exec(["python3", "-c", code])
    seen = result.stdout.strip()
    return Check("other processes", seen == "0", f"read the environment of {seen}")


async def _processes(sandbox: Sandbox, folder: Path) -> Check:
    """A fork bomb, of a size that would do no harm if it went off."""
    code = (
        "import os, time\n"
        "for _ in range(200):\n"
        "    if os.fork() == 0: time.sleep(30)\n"
        "print('all there')"
    )
    result = await sandbox.exec(["python3", "-c", code])
    held = "all there" not in result.stdout
    return Check("fork bomb", held, result.killed_by or _last(result.stderr) or "200 processes")


async def _memory(sandbox: Sandbox, folder: Path) -> Check:
    """More memory than allowed, in parts that each are within the limit."""
    code = (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if os.fork() == 0:\n"
        "        data = bytearray(100 << 20); time.sleep(3); os._exit(0)\n"
        "for _ in range(6): os.wait()\n"
        "print('all there')"
    )
    result = await sandbox.exec(["python3", "-c", code])
    held = "all there" not in result.stdout
    return Check("memory", held, result.killed_by or _last(result.stderr) or "600 MiB")


async def _daemon(sandbox: Sandbox, folder: Path) -> Check:
    """A process that leaves its session and outlives its command."""
    code = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  "
    code += "for _ in range(50): open('alive', 'a').write('x'); time.sleep(0.05)"
    await sandbox.exec(["python3", "-c", code])
    sizes = []
    for _ in range(2):
        result = await sandbox.exec(["sh", "-c", "sleep 0.2; cat alive 2>/dev/null | wc -c"])
        sizes.append(result.stdout.strip())
    return Check("daemon", sizes[0] == sizes[1], "gone" if sizes[0] == sizes[1] else "lives on")


async def _loop(sandbox: Sandbox, folder: Path) -> Check:
    began = time.monotonic()
    code = "import signal\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n"
    code += " except OSError: pass\nwhile True: pass"
    result = await sandbox.exec(["python3", "-c", code], timeout_s=1.0)
    seconds = time.monotonic() - began
    return Check("deadline", result.timed_out and seconds < 4, f"{seconds:.1f} s, of 1.0")


_ATTEMPTS: tuple[Attempt, ...] = (
    _network,
    _reading,
    _writing,
    _environment,
    _processes,
    _memory,
    _daemon,
    _loop,
)


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2][:100]
