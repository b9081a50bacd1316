"""The real SGLang, on a CPU: what it samples, what it makes of new weights, and learning with it.

REMEND_SGLANG_PYTHON is the interpreter of an environment made from ``rl/sglang-cpu.txt``. One
server for most of this, two behind the real router for the rest; both by `remend serve`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import jax
import numpy as np
import optax
import pytest

from configs.files import read_jsonl
from model.config import Qwen3Config
from model.decode import Engine
from model.qwen3 import Params, init
from model.tokenizer import Tokenizer
from rl.engines import SGLang
from rl.fleet import Fleet, Mismatch, Patience
from rl.inprocess import InProcessServer
from rl.launch import free_port, router_command
from rl.learning import RLConfig
from rl.probe import Prober
from rl.replica import Replica
from rl.rollout import Episode
from rl.serving import SGLangConfig, open_server
from rl.sglang import SGLangServer
from rl.snapshot import Snapshot, Snapshots, label_of
from rl.train import train_rl
from rl.train_ahead import train_ahead
from sft.chat import Renderer
from sft.learner import Learner, OptimizerConfig, nll
from sft.packing import Example, microbatches, pack
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, Turn, load
from tests.runs import steps_of

PYTHON = os.environ.get("REMEND_SGLANG_PYTHON", "")
pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="REMEND_SGLANG_PYTHON is not set"),
]
START_S = 300.0
TOLERANCE = 1e-3  # nats, in the mean


class World:
    """A small random policy, its snapshots, and servers that hold the first of them."""

    def __init__(self, root: Path, tokenizer: Tokenizer) -> None:
        self.root, self.tokenizer = root, tokenizer
        self.config = Qwen3Config(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
        )
        self.stop = tokenizer.id("<|im_end|>")
        self.snapshots = Snapshots(root / "snapshots", self.config, tokenizer, keep=50)
        self.prober = Prober(self.config)
        self.params = init(self.config, 0)
        self.first = self.snapshots.write(self.params, 0)
        self.children: list[subprocess.Popen] = []
        self.urls: list[str] = []

    def serve(self, port: int = 0) -> subprocess.Popen:
        """Start one more server, or one that takes the place of another."""
        fresh = port or free_port()
        command = [sys.executable, "-m", "tools.cli", "serve", str(self.first.folder)]
        command += ["--chip", "cpu", "--python", PYTHON, "--port", str(fresh), "--tokens", "8192"]
        child = self.start(command, f"server-{fresh}")
        if not port:
            self.urls.append(f"http://127.0.0.1:{fresh}")
        return child

    def start(self, command: list[str], name: str) -> subprocess.Popen:
        log = (self.root / f"{name}.log").open("ab")
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.children.append(child)
        return child

    def wait(self, url: str, path: str = "/model_info") -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_S:
            for child in self.children:
                if child.poll() not in (None, -signal.SIGKILL):
                    logs = "".join(p.read_text()[-3000:] for p in self.root.glob("*.log"))
                    raise RuntimeError(f"{child.args} ended:\n{logs}")
            try:
                if httpx2.get(f"{url}{path}", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx2.HTTPError:
                time.sleep(0.5)
        raise RuntimeError(f"{url} did not come up in {START_S:.0f} s")

    def end(self) -> None:
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def client(self, urls: list[str], temperature: float = 1.0, **options: Any) -> SGLangServer:
        return open_server(
            "sglang",
            SGLangConfig(urls=tuple(urls), start_s=START_S, tolerance=TOLERANCE, **options),
            self.config,
            "rl",
            stop_ids=(self.stop,),
            temperature=temperature,
            lag=options.get("update") == "in_place",
            slots=8,
            max_tokens=512,
            logs=self.root,
            say=print,
        )

    def logprobs(self, params: Params, ids: list[int], temperature: float) -> np.ndarray:
        """The learner's, of each id but the first."""
        learner = Learner(self.config, optax.identity(), nll, None, temperature)
        example = Example(ids, [0.0] + [1.0] * (len(ids) - 1))
        (rows,) = microbatches(pack([example], 512, 512), 1)
        return learner.logprobs(params, rows)[0, : len(ids) - 1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[World]:
    """With one server, which is up."""
    found = World(tmp_path_factory.mktemp("sglang"), tokenizer)
    try:
        found.serve()
        found.wait(found.urls[0])
        yield found
    finally:
        found.end()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def perturbed(params: Params, seed: int) -> Params:
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(
        lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), params
    )


async def talk(
    world: World, server: Any, seed: int, *, thinking: bool, turns: int = 3, max_new: int = 12
) -> list[tuple[list[int], Any]]:
    """Turns of one episode as the renderer makes them: new ids, and the reply."""
    renderer = Renderer(world.tokenizer, thinking=thinking)
    session = await server.open(seed)
    new, found = renderer.prompt(f"Repair number {seed}."), []
    for turn in range(turns):
        reply = await session.reply(new, [""], max_new)
        found.append((new, reply))
        new = renderer.observation([f"{turn} tests fail\n"], ended=reply.ended)
    session.close()
    return found


def test_greedy_tokens_are_those_of_the_server_in_process(world: World) -> None:
    async def work() -> None:
        server = world.client(world.urls, temperature=0.0)
        engine = Engine(world.params, world.config, slots=4, max_len=512)
        own = InProcessServer(engine, "rl", (world.stop,), 0.0)
        try:
            await server.publish(world.first, world.prober(world.params, 0))
            for seed in range(4):
                for thinking in (False, True):
                    theirs = await talk(world, server, seed, thinking=thinking, max_new=32)
                    ours = await talk(world, own, seed, thinking=thinking, max_new=32)
                    assert [r.ids for _, r in theirs] == [r.ids for _, r in ours]
                    assert sum(len(r.ids) for _, r in ours) >= 32
            assert server.metrics()["server/prefix_hits"] > 0.5
        finally:
            await server.close()

    run(work)


@pytest.mark.parametrize("update", ["drain", "retract", "in_place"])
def test_after_each_update_logprobs_are_the_learners(world: World, update: Any) -> None:
    async def work() -> None:
        server = world.client(world.urls, temperature=0.7, update=update)
        try:
            for version in range(1, 4):
                params = perturbed(world.params, version)
                snapshot = world.snapshots.write(params, version)
                await server.publish(snapshot, world.prober(params, version))
                ids: list[int] = []
                sampled: dict[int, float] = {}
                for new, reply in await talk(world, server, version, thinking=False):
                    assert set(reply.versions) == {version}
                    ids += new
                    sampled |= {len(ids) + i: x for i, x in enumerate(reply.logprobs)}
                    ids += reply.ids
                expected = world.logprobs(params, ids, 0.7)
                error = [abs(expected[at - 1] - x) for at, x in sampled.items()]
                assert np.mean(error) <= TOLERANCE
                assert server.metrics()["probe/mean"] <= TOLERANCE
        finally:
            await server.close()

    run(work)


def test_a_turn_that_is_under_way_goes_on_with_new_weights(world: World) -> None:
    async def work() -> None:
        server = world.client(world.urls, update="in_place")
        try:
            await server.publish(world.first, world.prober(world.params, 0))
            params = perturbed(world.params, 9)
            snapshot, probe = world.snapshots.write(params, 1), world.prober(params, 1)
            going = [
                asyncio.create_task(talk(world, server, seed, thinking=False, turns=1, max_new=400))
                for seed in range(3)
            ]
            await asyncio.sleep(0.1)  # they are under way, and far from their end
            await server.publish(snapshot, probe)
            found = [reply for task in going for _, reply in await task]
            assert {v for reply in found for v in reply.versions} == {0, 1}
            for reply in found:
                assert reply.versions == sorted(reply.versions)
        finally:
            await server.close()

    run(work)


def test_a_missing_tensor_is_served_as_success_and_found_by_the_probe(
    world: World, tmp_path: Path
) -> None:
    """What validation guards against, and the probe behind it."""
    from safetensors.numpy import load_file, save_file

    params = perturbed(world.params, 5)
    good = world.snapshots.write(params, 5)
    folder = tmp_path / "v000005"
    folder.mkdir()
    for file in good.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.mlp.down_proj.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    bad = Snapshot(folder, 5, label_of(folder, 5))

    async def work() -> None:
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
            replica = Replica(world.urls[0], http, None)
            engine = SGLang("drain", 5.0, 60.0)
            fleet = Fleet([replica], engine, world.config, Patience(tolerance=TOLERANCE))
            await engine.update(replica, bad)  # "success"
            assert await engine.label(replica) == bad.label
            with pytest.raises(Mismatch, match="are not the learner's"):
                await fleet._verify(replica, bad, world.prober(params, 5))
            assert await engine.label(replica) == "rejected"

    run(work)


CONFIG = RLConfig(
    steps=10,
    tasks_per_step=4,
    group_size=8,
    row_tokens=512,
    row_targets=64,
    microbatch_rows=8,
    checkpoint_every=10,
    weight_cap=2.0,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, final_fraction=1.0),
)


def record_answers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every answer of a server from now on: the prompt, and ids with log-probabilities."""
    answers: set[str] = set()
    call = Replica.call

    async def recorded(self: Replica, path: str, body: Any = None, **options: Any) -> Any:
        data = await call(self, path, body, **options)
        if path == "/generate" and "rid" in body:
            pairs = [(x[1], x[0]) for x in data["meta_info"]["output_token_logprobs"]]
            answers.add(repr((body["input_ids"], pairs)))
        return data

    monkeypatch.setattr(Replica, "call", recorded)
    return answers


def check_sampled(t: Trajectory, step: int, lag: int, answers: set[str]) -> None:
    """The policy's tokens of an episode are those of some answers, to the byte, and none is older
    than allowed."""
    at = 0
    while POLICY in t.author[at:]:
        start = at + t.author[at:].index(POLICY)
        end = start
        while end < len(t.ids) and t.author[end] == POLICY:
            assert step - lag <= t.versions[end] <= step
            end += 1
        pairs = list(zip(t.ids[start:end], t.logprobs[start:end], strict=True))
        assert repr((t.ids[:start], pairs)) in answers
        at = end
    assert at == len(t.ids)


async def learn(
    world: World,
    server: SGLangServer,
    root: Path,
    config: RLConfig,
    *,
    thinking: bool,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> None:
    """GRPO on episodes of two turns, rewarded for even ids."""
    tasks: list[Any] = [SimpleNamespace(name=f"task-{n}", number=n) for n in range(4)]
    gate = asyncio.Semaphore(16)

    async def roll(episode: Episode) -> Trajectory:
        record = Trajectory(episode.task.name, "p", "op", "train", "rl", episode.seed, -1, "")
        number: int = episode.task.number  # type: ignore[attr-defined]
        async with gate:
            said = await talk(world, server, number, thinking=thinking, turns=2, max_new=4)
        for new, reply in said:
            record.add(new, ENVIRONMENT)
            record.add(reply.ids, POLICY, reply.logprobs, reply.versions)
            record.weight_version = reply.weight_version
            record.turns.append(Turn("", [], []))
        even = [i % 2 == 0 for _, reply in said for i in reply.ids[:2]]
        record.reward = sum(even) / len(even)
        record.verdict = {"verdict": "pass" if all(even) else "fail"}
        return record

    async def rollout(episodes: Any) -> list[Trajectory]:
        return list(await asyncio.gather(*map(roll, episodes)))

    snapshots = Snapshots(root / "snapshots", world.config, world.tokenizer, keep=3)

    async def publish(params: Params, version: int) -> None:
        await server.publish(snapshots.write(params, version), world.prober(params, version))

    def copy(params: Params, version: int) -> Any:
        return snapshots.copy(params), world.prober(params, version)

    def write(copied: Any, version: int) -> Any:
        return snapshots.write(copied[0], version), copied[1]

    async def serve(made: Any) -> None:
        await server.publish(*made)

    common: dict[str, Any] = {
        "seed": 0,
        "temperature": 1.0,
        "server_metrics": server.metrics,
        "on_step": on_step,
    }
    place = (config, world.config, init(world.config, 0), tasks, root)
    if config.max_staleness:
        await train_ahead(*place, roll=roll, copy=copy, write=write, serve=serve, **common)
    else:
        await train_rl(*place, rollout=rollout, publish=publish, **common)


@pytest.mark.parametrize(("thinking", "lag"), [(True, 0), (False, 1)])
def test_grpo_learns_and_trains_on_nothing_but_what_was_sampled(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thinking: bool, lag: int
) -> None:
    config = replace(CONFIG, max_staleness=lag)
    answers = record_answers(monkeypatch)

    async def work() -> None:
        server = world.client(world.urls, update="in_place" if lag else "drain")
        try:
            await learn(world, server, tmp_path, config, thinking=thinking)
        finally:
            await server.close()

    run(work)
    steps = steps_of(tmp_path)
    assert len(steps) == config.steps
    rewards = [s["rl/reward"] for s in steps]
    # servers do not sample alike from run to run: that it rises is seen, not how far
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.08
    for number, values in enumerate(steps):
        if not lag:
            assert values["mismatch/mean"] <= TOLERANCE
        done = load(tmp_path / "trajectories" / f"rl-{number + 1:06d}.jsonl")
        assert len(done) == 32
        for t in done:
            check_sampled(t, number, lag, answers)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_server_that_is_killed_under_a_run_comes_back_and_the_run_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """The only server dies by SIGKILL while episodes run on it, and is started again with the
    snapshot it was first started with: it must catch up before a token of it is used."""
    config = replace(CONFIG, steps=6, max_staleness=lag)
    answers = record_answers(monkeypatch)
    killed: list[float] = []
    port = int(world.urls[0].rpartition(":")[2])
    first = next(c for c in reversed(world.children) if str(port) in c.args and c.poll() is None)
    server_of_run: list[SGLangServer] = []

    async def kill() -> None:
        while not server_of_run[0].fleet.replicas[0].running:  # under an episode
            await asyncio.sleep(0.001)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        killed.append(time.monotonic())
        world.serve(port)

    async def work() -> None:
        server = world.client(world.urls[:1])
        server_of_run.append(server)
        killers: list[asyncio.Task[None]] = []

        def on_step(done: int, of: int, values: dict[str, float]) -> None:
            if done == 2:
                killers.append(asyncio.create_task(kill()))

        try:
            async with asyncio.timeout(2 * START_S):  # nothing hangs
                await learn(world, server, tmp_path, config, thinking=False, on_step=on_step)
            await killers[0]
            label = await server.fleet.engine.label(server.fleet.replicas[0])
            assert label == server.fleet.label
        finally:
            await server.close()

    run(work)
    steps = steps_of(tmp_path)
    assert len(steps) == config.steps and len(killed) == 1
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert sum(row["time/server/retries"] for row in rows) >= 1  # it did hurt
    for number in range(config.steps):
        done = load(tmp_path / "trajectories" / f"rl-{number + 1:06d}.jsonl")
        assert len(done) == 32
        for t in done:
            check_sampled(t, number, lag, answers)


def test_two_servers_behind_the_router(world: World) -> None:
    """Turns go through the router and stay with their server, weights go to each; one that is
    killed comes back with what it was started with, and is caught up."""
    second = world.serve()
    router_port = free_port()
    world.wait(world.urls[1])
    world.start(router_command(PYTHON, world.urls, router_port), "router")
    router = f"http://127.0.0.1:{router_port}"
    world.wait(router, "/readiness")

    async def work() -> None:
        server = world.client(world.urls, router=router)
        try:
            for version in (1, 2):
                params = perturbed(world.params, 20 + version)
                snapshot = world.snapshots.write(params, version)
                await server.publish(snapshot, world.prober(params, version))
                async with asyncio.timeout(30):  # it returns when the first serves
                    while len(server.fleet.serving()) < 2:
                        await asyncio.sleep(0.05)
                talks = [talk(world, server, s, thinking=False) for s in range(6)]
                for said in await asyncio.gather(*talks):
                    assert all(set(reply.versions) == {version} for _, reply in said)
            assert server.metrics()["server/prefix_hits"] > 0.3
            os.killpg(second.pid, signal.SIGKILL)
            second.wait()
            async with asyncio.timeout(60):
                while len(server.fleet.serving()) == 2:
                    await asyncio.sleep(0.2)
            params = perturbed(world.params, 33)
            snapshot = world.snapshots.write(params, 3)
            await server.publish(snapshot, world.prober(params, 3))
            world.serve(int(world.urls[1].rpartition(":")[2]))
            async with asyncio.timeout(START_S):
                while len(server.fleet.serving()) < 2:
                    await asyncio.sleep(0.2)
            labels = [await server.fleet.engine.label(r) for r in server.fleet.replicas]
            assert labels == [snapshot.label] * 2
        finally:
            await server.close()

    run(work)
