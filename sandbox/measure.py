"""What sandboxes cost on this machine: each backend, and containers as one would use them without a
pool, measured in turns in one run.

An episode here is a repair without its policy: a lease, a file read and written, two test runs, a
diff. `docker create+start` and `fresh container` make a container of the same image, with the same
limits, for every episode; in the latter pytest is started in it anew each time, by `docker exec`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from sandbox.backends import make_pool
from sandbox.base import Limits, Sandbox, SandboxBroken, SandboxPool, Tree
from sandbox.docker import ContainerConfig, DockerHost, Engine
from sandbox.isolation import HOME_INSIDE
from sandbox.peers import engine_for, measure_peer

GOOD = b"def add(a, b):\n    return a + b\n"
BAD = b"def add(a, b):\n    return a - b\n"
TEST = b"import mod\n\n\ndef test_add():\n    assert mod.add(1, 2) == 3\n"
TESTS = ("tests/test_mod.py::test_add",)
LIMITS = Limits(memory_mib=256, processes=32)
FILLER = 200  # other modules of the tree, so that it is the size of a small package

Rows = list[dict[str, Any]]


def make_tree(folder: Path) -> Tree:
    """A small package with a bug in it."""
    for path, data in {"mod.py": GOOD, "tests/test_mod.py": TEST, **_others()}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return Tree(folder, {"mod.py": BAD})


async def measure(
    backends: Sequence[str],
    hosts: Sequence[DockerHost] = (),
    rounds: int = 30,
    slots: int = 4,
    container: ContainerConfig | None = None,
    peers: Sequence[tuple[str, Path]] = (),
) -> dict[str, Any]:
    """`{"rows": [{"name", "measure", "value", "ratio"}], "unavailable": {NAME: why}}`, and, with
    `peers` (name, interpreter), `"peers": {NAME VERSION: {MEASURE: ours beside theirs}}`.

    Values are milliseconds (medians), or episodes a second; `ratio` is to the same measure of a
    fresh container, above 1 where the row is better; None where there is nothing to compare.
    """
    rows: Rows = []
    unavailable: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="remend-bench-") as name:
        tree = make_tree(Path(name))
        plain: dict[str, float] = {}
        if "docker" in backends:
            try:
                plain = await asyncio.to_thread(
                    fresh_containers, hosts[0] if hosts else DockerHost(), rounds, slots, container
                )
            except (SandboxBroken, InputError) as error:
                unavailable["docker"] = str(error)
                backends = [backend for backend in backends if backend != "docker"]
        for name in backends:
            try:
                pool = make_pool(name, slots, LIMITS, hosts, container)
                async with pool:
                    found = await _backend(pool, tree, rounds, slots)
            except (SandboxBroken, InputError) as error:
                unavailable[name] = str(error)
                continue
            rows += [_row(name, measure, value, plain) for measure, value in found.items()]
        rows += [_row("docker create+start", m, v, {}) for m, v in plain.items()]
    ours = {row["measure"]: row["value"] for row in rows if row["name"] == "docker"}
    beside: dict[str, dict[str, float]] = {}
    for name, python in peers:
        try:
            found = await asyncio.to_thread(_peer, name, python, hosts, rounds, slots)
        except (SandboxBroken, InputError) as error:
            unavailable[name] = str(error)
            continue
        label = f"{name} {found.pop('version')}"
        rows += [_row(label, measure, value, plain) for measure, value in found.items()]
        if ours:
            beside[label] = {
                "episodes/s": round(ours["episodes/s"] / found["episodes/s"], 2),
                "lease ms": round(found["fresh ms"] / ours["lease ms"], 2),
                "exec ms": round(found["exec ms"] / ours["exec ms"], 2),
            }
    return {"rows": rows, "unavailable": unavailable, "peers": beside}


def _peer(
    name: str, python: Path, hosts: Sequence[DockerHost], rounds: int, slots: int
) -> dict[str, Any]:
    engine = engine_for(hosts[0] if hosts else DockerHost(), LIMITS)
    try:
        files = {"mod.py": BAD, "tests/test_mod.py": TEST, **_others()}
        fix = ("mod.py", GOOD)
        return measure_peer(name, python, engine, files, fix, TESTS, max(slots, rounds // 3), slots)
    finally:
        engine.disconnect()


def _others() -> dict[str, bytes]:
    return {f"other_{number}.py": GOOD * 40 for number in range(FILLER)}


def _row(name: str, measure: str, value: float, plain: dict[str, float]) -> dict[str, Any]:
    base = plain.get("episodes/s" if measure == "episodes/s" else "fresh ms")
    ratio = None
    if base and value:
        ratio = value / base if measure == "episodes/s" else base / value
    if measure not in ("lease ms", "reset ms", "fresh ms", "episodes/s"):
        ratio = None
    return {
        "name": name,
        "measure": measure,
        "value": round(value, 3),
        "ratio": ratio and round(ratio, 2),
    }


async def _backend(pool: SandboxPool, tree: Tree, rounds: int, slots: int) -> dict[str, float]:
    other = dataclasses.replace(tree, overlay={})
    async with contextlib.AsyncExitStack() as stack:  # every slot is started, and knows the tree
        for _ in range(slots):
            sandbox = await stack.enter_async_context(pool.lease(tree))
            await sandbox.run_tests(TESTS)

    found: dict[str, float] = {}
    state = {"turn": 0}

    async def lease() -> None:
        state["turn"] += 1
        async with pool.lease(tree if state["turn"] % 2 else other):
            pass

    found["lease ms"] = await _median(lease, rounds)
    async with pool.lease(tree) as sandbox:

        async def reset() -> None:
            await sandbox.reset(tree)

        async def spoil() -> None:
            await sandbox.exec(["sh", "-c", "echo x >> mod.py; mkdir -p a/b; touch a/b/c"])

        async def test() -> None:
            await sandbox.run_tests(TESTS)

        async def true() -> None:
            await sandbox.exec(["true"])

        found["reset ms"] = await _median(reset, rounds, spoil)
        found["exec ms"] = await _median(true, rounds)
        found["tests ms"] = await _median(test, rounds)
    began = time.monotonic()
    await asyncio.gather(*(_episode(pool, tree) for _ in range(rounds)))
    found["episodes/s"] = rounds / (time.monotonic() - began)
    return found


async def _episode(pool: SandboxPool, tree: Tree) -> None:
    async with pool.lease(tree) as sandbox:
        await sandbox.read("mod.py")
        await _must(sandbox, 1)
        await sandbox.write("mod.py", GOOD)
        await _must(sandbox, 0)
        if not await sandbox.diff():
            raise RuntimeError("a changed tree has no diff")


async def _must(sandbox: Sandbox, code: int) -> None:
    report = await sandbox.run_tests(TESTS)
    if report.exit_code != code:
        raise RuntimeError(f"tests ended with {report.exit_code}, not {code}: {report.tail}")


async def _median(
    work: Callable[[], Awaitable[None]],
    rounds: int,
    before: Callable[[], Awaitable[None]] | None = None,
) -> float:
    """Milliseconds."""
    took = []
    for _ in range(rounds):
        if before is not None:
            await before()
        began = time.perf_counter()
        await work()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def fresh_containers(
    host: DockerHost, rounds: int, slots: int, container: ContainerConfig | None
) -> dict[str, float]:
    """Containers as `docker create`, `start`, `exec`, `rm` make them, one for every episode."""
    from concurrent.futures import ThreadPoolExecutor

    engine = Engine(host, LIMITS, container or ContainerConfig(), "bench")
    engine.connect()
    took: list[float] = []
    exec_took: list[float] = []

    def episode(number: int) -> None:
        began = time.perf_counter()
        name = engine.create(["sleep", "1000"])
        try:
            engine.start(name)
            took.append(time.perf_counter() - began)
            began = time.perf_counter()
            engine.exec(name, ["true"])
            exec_took.append(time.perf_counter() - began)
            files = {"mod.py": BAD, "tests/test_mod.py": TEST, **_others()}
            engine.exec(name, ["tar", "-x"], _tar(files))
            pytest = ["env", f"PYTHONPATH={HOME_INSIDE}", "python3", "-m", "pytest", "-q", *TESTS]
            engine.exec(name, pytest)
            engine.exec(name, ["tar", "-x"], _tar({"mod.py": GOOD}))
            engine.exec(name, pytest)
        finally:
            engine.remove(name)

    try:
        with ThreadPoolExecutor(slots) as threads:
            began = time.perf_counter()
            list(threads.map(episode, range(max(slots, rounds // 3))))
            per_second = max(slots, rounds // 3) / (time.perf_counter() - began)
        took.clear()
        exec_took.clear()
        for number in range(max(3, rounds // 6)):
            episode(number)
    finally:
        engine.sweep(set)
        engine.disconnect()
    return {
        "fresh ms": statistics.median(took) * 1e3,
        "exec ms": statistics.median(exec_took) * 1e3,
        "episodes/s": per_second,
    }


def _tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()
