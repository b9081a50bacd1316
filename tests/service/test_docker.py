"""Sandboxes on real Docker engines: two of them, started by this test, one of which dies.

The contract and the attacks run over Docker in tests/sandbox, with `-m service -k docker`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from configs.errors import InputError
from rl.agent import AgentConfig, ScriptedSession, Session, TeacherPolicy
from rl.rollout import Episode, run_episodes
from sandbox.agent_tools import ToolCall
from sandbox.base import Limits, Tree
from sandbox.docker import LABEL, ContainerConfig, DockerHost, Engine
from sandbox.environments import Setting
from sandbox.local import LocalPool
from sandbox.pool import DockerPool
from sandbox.task import load_tasks
from sft.chat import Renderer
from sft.teacher import SearchTeacher
from tests.sandbox.box import make_tree
from tools.cli import main

pytestmark = [pytest.mark.service, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("docker_engine.sh")
LIMITS = Limits(memory_mib=256, processes=32)
GOOD = ["tests/test_mod.py::test_add"]


class Daemon:
    """An engine in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = DockerHost(f"unix://{folder}/docker.sock")

    def call(self, verb: str) -> None:
        done = subprocess.run([SCRIPT, verb, self.folder], capture_output=True, text=True)
        if verb == "start" and done.returncode:
            pytest.skip(f"no Docker engine here: {done.stderr.strip()[-300:]}")
        assert done.returncode == 0, done.stderr

    def containers(self) -> list[str]:
        import docker

        client = docker.DockerClient(self.host.url)
        try:
            return [c["Id"] for c in client.api.containers(all=True)]
        finally:
            client.close()

    def left(self) -> list[str]:
        """What of containers is there: themselves, processes, mounts, folders."""
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        found = [m for m in mounts if m.startswith(f"{self.folder}/") and "/overlay2/" in m]
        shims = subprocess.run(["pgrep", "-fa", f"{self.folder}/exec.*shim"], capture_output=True)
        found += shims.stdout.decode().splitlines()
        found += [str(path) for path in self.folder.glob("data/containers/*")]
        return [*self.containers(), *found]

    def comes_clean(self, seconds: float = 20.0) -> bool:
        until = time.monotonic() + seconds
        while self.left() and time.monotonic() < until:
            time.sleep(0.2)
        return not self.left()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    pytest.importorskip("docker")
    made = [Daemon(tmp_path_factory.mktemp("docker") / name) for name in ("one", "two")]
    try:
        for engine in made:
            engine.call("start")
        yield made
    finally:
        for engine in made:
            engine.call("stop")


@pytest.fixture
def tree(tmp_path) -> Tree:
    return make_tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def tasks():
    try:
        found = [t for t in load_tasks(split="heldout") if t.package == "inflection"]
    except InputError as error:
        pytest.skip(f"packages cannot be fetched: {error}")
    return found[:5]


CONFIG = AgentConfig(max_turns=2, max_tokens=4096, max_new_tokens=512)


def test_an_engine_dies_under_two_hundred_episodes(engines, tasks, tokenizer) -> None:
    """All end, each is counted once and is what it is in a sandbox of this machine; the engine
    comes back and is used again; nothing of all that is left."""
    one, two = engines
    render = Renderer(tokenizer)
    policy = TeacherPolicy(render)
    episodes = [Episode(task, seed) for seed in range(40) for task in tasks]
    assert len(episodes) == 200
    counted: Counter[tuple[str, int]] = Counter()
    told: list[str] = []

    async def go():
        hosts = [one.host, two.host]
        async with DockerPool(hosts, 8, LIMITS, warn=told.append) as pool:

            def on_done(trajectory) -> None:
                counted[trajectory.task, trajectory.seed] += 1
                if sum(counted.values()) == 40:
                    assert pool.members[1].slots  # it has its share
                    two.call("kill")

            done = await run_episodes(
                episodes, policy, pool, render, CONFIG, concurrency=8, on_done=on_done
            )
            during = pool.metrics()
            await asyncio.to_thread(two.call, "start")
            async with asyncio.timeout(120):
                while not pool.members[1].slots:  # its share again
                    await asyncio.sleep(0.2)
            more = await run_episodes(
                episodes[:20], policy, pool, render, CONFIG, concurrency=8, on_done=lambda t: None
            )
            return done, during, more, pool.metrics()

    done, during, more, after = asyncio.run(go())
    assert [(t.task, t.seed) for t in done] == [(e.task.name, e.seed) for e in episodes]
    assert set(counted.values()) == {1} and len(counted) == 200
    assert not any(t.verdict["verdict"] == "error" for t in done)
    assert during["hosts_up"] == 1 and during["failures"]["quarantine"] >= 1
    assert after["hosts_up"] == 2 and after["recoveries"] >= 1
    assert any("out of use" in line for line in told) and any("again" in line for line in told)
    for engine in engines:
        assert engine.comes_clean(), engine.left()

    async def here():
        async with LocalPool(2, LIMITS) as pool:
            return await run_episodes(
                episodes[:20], policy, pool, render, CONFIG, concurrency=2, on_done=lambda t: None
            )

    local = asyncio.run(here())
    assert [(t.ids, t.patch, t.reward) for t in local] == [
        (t.ids, t.patch, t.reward) for t in done[:20]
    ]
    assert [t.ids for t in more] == [t.ids for t in local]
    assert len({t.verdict["environment"] for t in [*done, *more]}) == 1


CRASH = """\
import asyncio, json, sys
from pathlib import Path
from sandbox.base import Limits, Tree
from sandbox.docker import ContainerConfig, DockerHost, Engine
from sandbox.pool import DockerPool

async def main():
    host = DockerHost(sys.argv[1])
    pool = DockerPool([host], 2, Limits(memory_mib=256))
    async with pool.lease(Tree(Path(sys.argv[2]))) as sandbox:
        # one that does not end with its input
        engine = Engine(host, Limits(memory_mib=256), ContainerConfig(), "crashed")
        engine.connect()
        name = engine.create(["sleep", "1000"])
        engine.start(name)
        print(json.dumps(name), flush=True)
        await sandbox.exec(["sleep", "1000"], timeout_s=1000)

asyncio.run(main())
"""


def test_a_killed_trainer_leaves_orphans_that_the_next_one_sweeps(engines, tree) -> None:
    one, _ = engines
    trainer = subprocess.Popen(
        [sys.executable, "-c", CRASH, one.host.url, str(tree.root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert trainer.stdout is not None
    orphan = json.loads(trainer.stdout.readline())
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert orphan in one.containers()
    # that of another trainer, which lives
    engine = Engine(one.host, LIMITS, ContainerConfig(), "alive")
    engine.connect()
    foreign = engine.create(["sleep", "1000"])
    engine.start(foreign)

    async def next_one():
        async with DockerPool([one.host], 1, LIMITS) as pool:
            async with pool.lease(tree) as sandbox:
                assert (await sandbox.run_tests(GOOD)).passed(GOOD)
            return pool.metrics()

    assert asyncio.run(next_one())["swept"] >= 1
    assert one.containers() == [foreign]
    engine.remove(foreign)
    engine.disconnect()
    assert one.comes_clean(), one.left()


def test_sixty_four_at_a_time(engines, tree) -> None:
    """None misses a deadline by waiting for another, and memory stays within what was given."""
    bug = {"src/mod.py": b"def add(a, b):\n    return a - b\n"}
    limits = dataclasses.replace(LIMITS, memory_mib=160)
    hosts = [engine.host for engine in engines]
    gathered = asyncio.Barrier(64)

    async def episode(pool: DockerPool) -> None:
        async with pool.lease(dataclasses.replace(tree, overlay=bug)) as sandbox:
            await gathered.wait()
            before = await sandbox.run_tests(GOOD)
            assert before.cases[0].outcome == "failed", before
            await sandbox.write("src/mod.py", b"def add(a, b):\n    return a + b\n")
            after = await sandbox.run_tests(GOOD)
            assert after.passed(GOOD), after
            assert (await sandbox.exec(["true"], timeout_s=5.0)).killed_by is None

    async def go() -> dict[str, int]:
        async with DockerPool(hosts, 64, limits) as pool:
            await asyncio.gather(*(episode(pool) for _ in range(64)))
            assert pool.metrics()["slots"] == 64 and not pool.metrics()["failures"]
            ids = [slot.container for member in pool.members for slot in member.slots]
            return {name: used for name in ids if (used := peak_memory(name))}

    used = asyncio.run(go())
    assert all(peak <= (160 + 128) << 20 for peak in used.values())
    assert sum(used.values()) <= 64 * 160 << 20
    for engine in engines:
        assert engine.comes_clean(), engine.left()


def peak_memory(container: str) -> int:
    """Bytes, 0 where this machine does not tell."""
    for path in (
        f"/sys/fs/cgroup/memory/docker/{container}/memory.max_usage_in_bytes",
        f"/sys/fs/cgroup/docker/{container}/memory.peak",
    ):
        if os.path.exists(path):
            return int(Path(path).read_text())
    return 0


def test_a_container_is_closed_on_every_side(engines, tree) -> None:
    """As the engine itself tells it."""
    import docker

    one, _ = engines

    async def go():
        async with DockerPool([one.host], 1, LIMITS) as pool, pool.lease(tree):
            client = docker.DockerClient(one.host.url)
            (found,) = client.containers.list(filters={"label": f"{LABEL}=container"})
            client.close()
            return found.attrs

    facts = asyncio.run(go())
    config, host = facts["Config"], facts["HostConfig"]
    assert int(config["User"].partition(":")[0]) >= 1000
    assert host["NetworkMode"] == "none" and host["CapDrop"] == ["ALL"] and not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges"] and host["ReadonlyRootfs"]
    assert host["Memory"] == host["MemorySwap"] > 0 and host["PidsLimit"] > 0
    assert host["NanoCpus"] == 10**9 and not host["Privileged"] and not host["Binds"]
    assert set(host["Tmpfs"]) == {"/work", "/tmp"} and all(
        "size=" in s for s in host["Tmpfs"].values()
    )


def test_the_full_environment_is_the_same_here_and_there(engines, tasks, tokenizer) -> None:
    """Whole suites, the build and the shell: episodes and verdicts are those of this machine."""
    render = Renderer(tokenizer)
    look = ToolCall("bash", {"command": "pwd; ls; python3 -V; cat setup.cfg | wc -l"})

    class Policy(TeacherPolicy):
        async def open(self, seed: int) -> Session:
            teacher = SearchTeacher(seed)
            first: list[str] = []

            def act(texts):
                if not first:
                    first.extend(texts)
                    return [look]
                if len(first) == 1:  # it has looked round, and begins
                    first.append("")
                    return teacher.act(first[:1])
                return teacher.act(texts)

            return ScriptedSession(act, render)

    async def go(pool):
        setting = Setting("full", judge_both=True, shell_without_isolation=True)
        episodes = [Episode(task, 1) for task in tasks[:2]]
        config = dataclasses.replace(CONFIG, max_turns=5)
        async with pool:
            return await run_episodes(
                episodes, Policy(render), pool, render, config, concurrency=2, setting=setting
            )

    there = asyncio.run(go(DockerPool([engines[0].host], 2, Limits())))
    here = asyncio.run(go(LocalPool(2, Limits(), shell=True)))
    for a, b in zip(there, here, strict=True):
        assert a.turns[0].observations[0].startswith("/work\n") and a.ids == b.ids
        assert a.patch == b.patch and len(a.verdicts) == len(b.verdicts) == 2
        for name in ("full", "simplified"):
            same = ("verdict", "judged_in", "build", "fail_to_pass", "pass_to_pass", "flags")
            assert all(a.verdicts[name][key] == b.verdicts[name][key] for key in same)


def test_a_container_that_goes_under_is_made_anew(engines, tree) -> None:
    """As the harness knows the files; whatever is asked first."""
    import docker

    one, _ = engines
    edited = b"def add(a, b):\n    return b + a\n"

    async def go(ask) -> None:
        async with DockerPool([one.host], 1, LIMITS) as pool, pool.lease(tree) as sandbox:
            await sandbox.write("src/mod.py", edited)
            await sandbox.exec(["sh", "-c", "echo lost > src/other.py"])
            client = docker.DockerClient(one.host.url)
            (found,) = client.containers.list(filters={"label": f"{LABEL}=container"})
            found.kill()
            client.close()
            await sandbox.exec(["true"])  # which finds out
            await ask(sandbox)
            assert await sandbox.read("src/mod.py") == edited
            assert "other.py" not in await sandbox.diff()
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)

    for ask in (
        lambda sandbox: sandbox.read("src/mod.py"),
        lambda sandbox: sandbox.write("src/mod.py", edited),
        lambda sandbox: sandbox.diff(),
        lambda sandbox: sandbox.run_tests(GOOD),
    ):
        asyncio.run(go(ask))


def test_a_runtime_that_does_not_shield_the_runner_is_refused(engines, tree) -> None:
    """gVisor, as far as it lets a test open the runner's descriptors, and forge its own report."""
    import docker

    one, _ = engines
    client = docker.DockerClient(one.host.url)
    runtimes = client.info()["Runtimes"]
    client.close()
    if "runsc" not in runtimes:
        pytest.skip("runsc is not installed")
    forge = "import os; os.open(f'/proc/{os.getppid()}/fd/3', os.O_RDONLY | os.O_NONBLOCK)"
    told: list[str] = []

    async def go():
        container = ContainerConfig(runtime="runsc")
        async with DockerPool([one.host], 1, Limits(), container, warn=told.append) as pool:
            async with pool.lease(tree) as sandbox:
                assert (await sandbox.run_tests(GOOD)).passed(GOOD)
                return await sandbox.exec(["python3", "-c", forge])

    try:
        done = asyncio.run(go())
    except InputError as error:
        assert "runsc lets tests into the runner" in str(error)
    else:  # a later one, that does shield it
        assert "PermissionError" in done.stderr
    assert one.comes_clean(), one.left()


def test_hosts_that_start_nothing_say_so(engines, tree) -> None:
    """Once, and soon: nobody waits for a runtime that is not there."""
    told: list[str] = []

    async def go():
        container = ContainerConfig(runtime="nonsuch")
        hosts = [engine.host for engine in engines]
        async with DockerPool(hosts, 4, LIMITS, container, warn=told.append) as pool:
            async with pool.lease(tree):
                pass

    began = time.monotonic()
    with pytest.raises(InputError, match="no Docker host works.*nonsuch"):
        asyncio.run(go())
    assert time.monotonic() - began < 30
    assert len(told) == 2 and all("nonsuch" in line for line in told)


@pytest.mark.parametrize("what", ["named", "folder"])
def test_an_image_of_the_users(engines, tree, tmp_path, what) -> None:
    """A named image, or a Dockerfile, gets the runner put into it."""
    import docker

    one, _ = engines
    client = docker.DockerClient(one.host.url)
    base = next(tag for image in client.images.list() for tag in image.tags)
    client.close()
    image = base
    if what == "folder":
        (tmp_path / "Dockerfile").write_text(f"FROM {base}\nENV FROM_DOCKERFILE=yes\nUSER 0\n")
        image = str(tmp_path)

    async def go():
        pool = DockerPool([one.host], 1, LIMITS, ContainerConfig(image=image))
        async with pool, pool.lease(tree) as sandbox:
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
            return pool.environment

    assert len(asyncio.run(go())) == 64


def test_a_host_is_trusted_by_its_own_authority_alone(tmp_path, monkeypatch) -> None:
    """Whatever the environment says of other servers'."""
    import requests

    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "others.pem"))
    host = DockerHost("tcp://localhost:2376", tls=str(tmp_path))
    with requests.Session() as session:
        Engine(host, LIMITS, ContainerConfig(), "x")._tls().configure_client(session)
        used = session.merge_environment_settings("https://localhost:2376", {}, None, None, None)
    assert used["verify"] == str(tmp_path / "ca.pem")


def test_the_command_line(engines, tree, capfd) -> None:
    one, _ = engines
    docker = ["--backend", "docker", "--host", one.host.url]
    command = ["--dir", str(tree.root), "--json", "--", "sh", "-c", "cat src/mod.py; exit 3"]
    assert main(["sandbox", "run", *docker, *command]) == 1
    told = json.loads(capfd.readouterr().out)
    assert told["exit_code"] == 3 and "def add" in told["stdout"]
    nowhere = ["--backend", "docker", "--host", "unix:///nonexistent.sock", "--", "true"]
    assert main(["sandbox", "run", *nowhere]) == 2
    assert "no Docker engine answers" in capfd.readouterr().err
    assert main(["sandbox", "run", "--backend", "docker", "--host", "ftp://x", "--", "true"]) == 2
    assert main(["sandbox", "check", "--host", one.host.url, "--json"]) in (0, 1)
    found = json.loads(capfd.readouterr().out)["backends"]["docker"]["checks"]
    assert all(check["contained"] for check in found), found
