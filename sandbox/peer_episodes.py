"""Episodes in another project's Docker environment; run by an interpreter that has it.

`python peer_episodes.py JOB`, where JOB is JSON: {"peer", "image", "rounds", "slots", "test",
"fix"}, the last two shell commands. DOCKER_HOST names the engine, and `docker` is on the path.
Prints JSON: {"version", "fresh ms", "exec ms", "episodes/s"}, medians.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol


class Environment(Protocol):
    """One container of a peer."""

    async def start(self) -> None: ...

    async def run(self, command: str) -> int:
        """Exit code of a shell command."""
        ...

    async def stop(self) -> None: ...


class MiniSweAgent:
    """mini-swe-agent's `DockerEnvironment`: `docker run` of a sleep, and `docker exec`."""

    package = "mini-swe-agent"

    def __init__(self, image: str) -> None:
        from minisweagent.environments.docker import DockerEnvironment

        self._image, self._class = image, DockerEnvironment

    async def start(self) -> None:
        self._made = await asyncio.to_thread(
            self._class,
            image=self._image,
            cwd="/repo",
            interpreter=["sh", "-c"],
            run_args=["--rm", "--network", "none"],
        )

    async def run(self, command: str) -> int:
        done = await asyncio.to_thread(self._made.execute, {"command": command})
        return int(done["returncode"])

    async def stop(self) -> None:
        self._made.cleanup()


class SweRex:
    """SWE-ReX's `DockerDeployment`: a server in the container, asked over HTTP.

    It runs from its own environment here, mounted: no image of a registry has it. It shares our
    network, for an engine without a bridge publishes no ports; so each needs a port of its own.
    """

    package = "swe-rex"

    def __init__(self, image: str) -> None:
        from swerex.deployment.docker import DockerDeployment
        from swerex.utils.free_port import find_free_port

        port = find_free_port()

        class Deployment(DockerDeployment):
            def _get_swerex_start_cmd(self, token: str) -> list[str]:
                server = f"{sys.prefix}/bin/swerex-remote --host 127.0.0.1 --port {port}"
                return ["/bin/sh", "-c", f"{server} --auth-token {token}"]

        libraries = f"/lib/{sysconfig.get_config_var('MULTIARCH')}"
        folders = (sys.prefix, sys.base_prefix, libraries)
        mounts = [f"-v{path}:{path}:ro" for path in dict.fromkeys(folders)]
        self._made = Deployment(
            image=image, port=port, pull="never", docker_args=["--network=host", "-w/repo", *mounts]
        )

    async def start(self) -> None:
        await self._made.start()

    async def run(self, command: str) -> int:
        from swerex.runtime.abstract import Command

        done = await self._made.runtime.execute(Command(command=command, shell=True))
        return int(done.exit_code or 0)

    async def stop(self) -> None:
        await self._made.stop()


PEERS: dict[str, Any] = {"mini-swe-agent": MiniSweAgent, "swe-rex": SweRex}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Episodes in `slots` processes, for what is meant for one agent a process; then one alone."""
    with ProcessPoolExecutor(job["slots"]) as processes:
        list(processes.map(imported, [job] * job["slots"]))
        began = time.perf_counter()
        list(processes.map(episode, [job] * job["rounds"]))
        per_second = job["rounds"] / (time.perf_counter() - began)
    took = [asyncio.run(start_and_exec(job)) for _ in range(max(3, job["rounds"] // 3))]
    return {
        "version": importlib.metadata.version(PEERS[job["peer"]].package),
        "fresh ms": statistics.median(start for start, _ in took) * 1e3,
        "exec ms": statistics.median(command for _, command in took) * 1e3,
        "episodes/s": per_second,
    }


def imported(job: dict[str, Any]) -> None:
    """Have the peer's modules loaded."""
    PEERS[job["peer"]](job["image"])


def episode(job: dict[str, Any]) -> None:
    asyncio.run(repair(PEERS[job["peer"]](job["image"]), job["test"], job["fix"]))


async def repair(environment: Environment, test: str, fix: str) -> None:
    await environment.start()
    try:
        await environment.run("cat mod.py")
        await must(environment, test, 1)
        await must(environment, fix, 0)
        await must(environment, test, 0)
        await environment.run("diff -r /pristine /repo")
    finally:
        await environment.stop()


async def start_and_exec(job: dict[str, Any]) -> tuple[float, float]:
    """Seconds of each."""
    environment: Environment = PEERS[job["peer"]](job["image"])
    start = await timed(environment.start)
    try:
        return start, await timed(lambda: environment.run("true"))
    finally:
        await environment.stop()


async def must(environment: Environment, command: str, code: int) -> None:
    found = await environment.run(command)
    if found != code:
        raise RuntimeError(f"{command!r} ended with {found}, not {code}")


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
