"""Fleets of servers that break in every way that is known, over real HTTP.

One law holds in all of it: a token that reaches an episode was sampled by the weights whose version
it carries, and every turn continues the very ids before it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import InputError
from model.config import Qwen3Config
from model.export_folder import MANIFEST
from model.qwen3 import init
from model.tokenizer import Tokenizer
from rl.engines import SGLang, SGLangJax, Update
from rl.fleet import Fleet, Patience
from rl.policy_server import ServerError
from rl.probe import Probe, Prober
from rl.replica import Replica
from rl.sglang import Sampling, SGLangServer
from rl.snapshot import Snapshot, Snapshots, label_of, version_of
from tests.rl.fake_sglang import FakeSGLang, all_logprobs

PATIENCE = Patience(health_s=0.05, retry_s=0.02, call_s=5.0, start_s=10.0, tolerance=1e-4)
STOP, TEMPERATURE = 5, 0.8
VERSIONS = 3


class World:
    """Three versions of a policy, as parameters, snapshots and probes."""

    def __init__(self, root: Path, tokenizer: Tokenizer) -> None:
        self.config = Qwen3Config(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
        )
        snapshots = Snapshots(root / "snapshots", self.config, tokenizer, keep=VERSIONS)
        prober = Prober(self.config)
        self.params = [init(self.config, seed) for seed in range(VERSIONS)]
        self.snapshots = [snapshots.write(p, v) for v, p in enumerate(self.params)]
        self.probes: list[Probe] = [prober(p, v) for v, p in enumerate(self.params)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> World:
    return World(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.fixture
def fakes(world: World) -> Iterator[list[FakeSGLang]]:
    """Two servers, both started with version 0 by somebody else, under a name that says nothing."""
    found = [FakeSGLang(world.config).start(world.snapshots[0].folder, "default") for _ in range(2)]
    yield found
    for fake in found:
        if fake.up:
            fake.kill()


@asynccontextmanager
async def serving(
    world: World, fakes: list[FakeSGLang], *, update: Update = "drain", **sampling: Any
) -> AsyncIterator[SGLangServer]:
    """A policy server over the fakes, that serves version 0."""
    http = httpx2.AsyncClient(timeout=None, trust_env=False)
    engine = SGLang(update, drain_s=2.0, load_s=5.0)
    replicas = [Replica(fake.url, http, None) for fake in fakes]
    fleet = Fleet(replicas, engine, world.config, PATIENCE)
    options = {"request_s": 0.6, **sampling}
    server = SGLangServer(
        "rl", fleet, http, world.config.vocab_size, Sampling((STOP,), TEMPERATURE, **options)
    )
    try:
        await publish(world, server, 0)
        yield server
    finally:
        await server.close()


async def publish(world: World, server: SGLangServer, version: int) -> None:
    await server.publish(world.snapshots[version], world.probes[version])


async def episode(
    world: World, server: SGLangServer, seed: int, turns: int = 3, max_new: int = 6
) -> list[int]:
    """A conversation; holds the law of the module's docstring. The versions of its tokens."""
    session = await server.open(seed)
    ids: list[int] = []
    versions: list[int] = []
    for turn in range(turns):
        new = [10 + seed % 50, 11 + turn, 12]
        reply = await session.reply(new, [""], max_new)
        ids += new
        for token, logprob, version in zip(reply.ids, reply.logprobs, reply.versions, strict=True):
            table = all_logprobs(world.config, world.params[version], ids, TEMPERATURE)
            assert logprob == pytest.approx(table[-1, token], abs=1e-4)
            ids.append(token)
        assert reply.ended == (reply.ids[-1] == STOP)
        assert session._ids == ids
        versions += reply.versions
    session.close()
    return versions


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):  # nothing hangs
            await work()

    asyncio.run(limited())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(8):
        while not true():
            await asyncio.sleep(0.01)


def test_episodes_keep_to_one_server_and_get_new_weights(
    world: World, fakes: list[FakeSGLang]
) -> None:
    async def work() -> None:
        async with serving(world, fakes) as server:
            for version in range(VERSIONS):
                await publish(world, server, version)
                found = await asyncio.gather(*(episode(world, server, s) for s in range(6)))
                assert {v for versions in found for v in versions} == {version}
            figures = server.metrics()
            assert figures["server/serving"] == 2 and figures["server/retries"] == 0
            assert figures["server/tokens_per_s"] > 0 and figures["probe/max"] < 1e-4
            assert 0 <= figures["server/idle"] <= 1
        first, second = ({p[0] for p in fake.prompts} for fake in fakes)
        assert first and second  # the load is shared
        for fake in fakes:  # each prompt continues an earlier one of the same server, or is a first
            for prompt in fake.prompts:
                begun = [p for p in fake.prompts if len(p) < len(prompt)]
                assert len(prompt) == 3 or any(prompt[: len(p)] == p for p in begun)

    run(work)


@pytest.mark.parametrize("fault", ["500", "cut", "hang", "abort", "stale", "nan", "alien", "short"])
def test_a_bad_answer_is_thrown_away_and_the_turn_sampled_anew(
    world: World, fakes: list[FakeSGLang], fault: str
) -> None:
    async def work() -> None:
        async with serving(world, fakes) as server:
            for fake in fakes:
                fake.faults.extend([fault] * 2)
            found = await asyncio.gather(*(episode(world, server, s) for s in range(4)))
            assert {v for versions in found for v in versions} == {0}
            assert server.metrics()["server/retries"] >= 1
            await until(lambda: len(server.fleet.serving()) == 2)  # well again

    run(work)


def test_a_server_that_is_killed_comes_back_with_old_weights_and_catches_up(
    world: World, fakes: list[FakeSGLang]
) -> None:
    async def work() -> None:
        async with serving(world, fakes) as server:
            await publish(world, server, 1)
            going = [asyncio.create_task(episode(world, server, s, turns=5)) for s in range(6)]
            await asyncio.sleep(0.05)
            fakes[0].kill()
            found = await asyncio.gather(*going)
            assert {v for versions in found for v in versions} == {1}
            await until(lambda: len(server.fleet.serving()) == 1)
            await publish(world, server, 2)  # it misses this one
            # back with what it was once started with, and that version's true name
            fakes[0].start(world.snapshots[0].folder, world.snapshots[0].label)
            assert fakes[0].label == world.snapshots[0].label
            going = [asyncio.create_task(episode(world, server, s)) for s in range(6)]
            await until(lambda: len(server.fleet.serving()) == 2)
            assert fakes[0].label == world.snapshots[2].label
            found = await asyncio.gather(*going)
            assert {v for versions in found for v in versions} == {2}

    run(work)


def test_a_restart_between_two_looks_is_noticed_by_the_answers(
    world: World, fakes: list[FakeSGLang]
) -> None:
    """The server is back before anyone looks: its next answer has another version."""

    async def work() -> None:
        async with serving(world, fakes[:1]) as server:
            await publish(world, server, 2)
            fakes[0].kill()
            fakes[0].start(world.snapshots[1].folder, world.snapshots[1].label)
            found = await episode(world, server, 1)
            assert set(found) == {2}

    run(work)


def test_a_server_that_serves_garbage_is_found_out(world: World, fakes: list[FakeSGLang]) -> None:
    """It says success and the new version; its weights are noise."""

    async def work() -> None:
        async with serving(world, fakes) as server:
            fakes[1].lie = True
            await publish(world, server, 1)
            assert fakes[1].updates[-1] == world.snapshots[1].label
            assert server.fleet.serving() == server.fleet.replicas[:1]
            # not even a router may use it by that name
            await until(lambda: fakes[1].label == "rejected")
            found = await asyncio.gather(*(episode(world, server, s) for s in range(4)))
            assert {v for versions in found for v in versions} == {1}
            fakes[1].lie = False
            await until(lambda: len(server.fleet.serving()) == 2)
            fakes[0].lie = fakes[1].lie = True
            with pytest.raises(ServerError, match="log-probabilities are not the learner's"):
                await publish(world, server, 2)

    run(work)


def spoilt(world: World, root: Path, how: str) -> Snapshot:
    """A copy of version 1 with a fault in it, its manifest made to agree where that is possible."""
    from hashlib import sha256
    from json import dumps, loads

    folder = root / "v000001"
    shutil.copytree(world.snapshots[1].folder, folder)
    weights = folder / "model.safetensors"
    stored = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "corrupt":
        data = bytearray(weights.read_bytes())
        data[-100] ^= 0xFF
        weights.write_bytes(data)
    elif how == "no manifest":
        (folder / MANIFEST).unlink()
        return Snapshot(folder, 1, world.snapshots[1].label)
    elif how == "missing":
        del stored[name]
        save_file(stored, weights)
    elif how == "misshapen":
        save_file(stored | {name: np.ascontiguousarray(stored[name].T)}, weights)
    if how != "corrupt":
        manifest = loads((folder / MANIFEST).read_text())
        data = weights.read_bytes()
        fact = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        manifest["files"][weights.name] = fact
        (folder / MANIFEST).write_text(dumps(manifest))
    return Snapshot(folder, 1, label_of(folder, 1))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("corrupt", "does not match the sha256"),
        ("missing", "'model.layers.1.mlp.up_proj.weight' is missing"),
        ("misshapen", "'model.layers.1.mlp.up_proj.weight' has shape"),
        ("no manifest", "no manifest"),
    ],
)
def test_no_server_is_told_of_a_bad_snapshot(
    world: World, fakes: list[FakeSGLang], tmp_path: Path, how: str, says: str
) -> None:
    async def work() -> None:
        async with serving(world, fakes) as server:
            told = [len(fake.updates) for fake in fakes]
            with pytest.raises(InputError, match=says):
                await server.publish(spoilt(world, tmp_path, how), world.probes[1])
            assert [len(fake.updates) for fake in fakes] == told
            assert set(await episode(world, server, 0)) == {0}  # what was there still serves

    run(work)


def test_a_learner_that_died_after_the_manifest_starts_over(
    world: World, fakes: list[FakeSGLang], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Servers hold version 1 of the dead run; the run that goes on has another version 1."""

    async def work() -> None:
        async with serving(world, fakes) as server:
            await publish(world, server, 1)
        again = Snapshots(tmp_path, world.config, tokenizer).write(world.params[2], 1)
        assert again.version == 1 and again.label != world.snapshots[1].label
        async with serving(world, fakes) as server:
            await server.publish(again, world.probes[2])
            assert {fake.label for fake in fakes} == {again.label}

    run(work)


@pytest.mark.parametrize("update", ["retract", "in_place"])
def test_a_turn_may_span_two_versions_and_says_so(
    world: World, fakes: list[FakeSGLang], update: Update
) -> None:
    async def work() -> None:
        async with serving(world, fakes, update=update, lag=1, request_s=20.0) as server:
            for fake in fakes:
                fake.token_s = 0.02
            going = [
                asyncio.create_task(episode(world, server, s, turns=1, max_new=30))
                for s in range(6)
            ]
            await asyncio.sleep(0.2)
            await publish(world, server, 1)
            found = await asyncio.gather(*going)
            assert {v for versions in found for v in versions} == {0, 1}
            assert all(versions == sorted(versions) for versions in found)

    run(work)


def test_tokens_of_a_version_that_is_too_old_are_sampled_anew(
    world: World, fakes: list[FakeSGLang]
) -> None:
    async def work() -> None:
        async with serving(world, fakes[:1], update="in_place", request_s=20.0) as server:
            fakes[0].token_s = 0.02
            going = asyncio.create_task(episode(world, server, 1, turns=1, max_new=20))
            await asyncio.sleep(0.2)
            await publish(world, server, 1)
            assert set(await going) == {1}
            assert server.metrics()["server/discarded"] > 0

    run(work)


def test_an_id_outside_the_vocabulary_is_never_sent(world: World, fakes: list[FakeSGLang]) -> None:
    async def work() -> None:
        async with serving(world, fakes[:1]) as server:
            for ids in ([1, world.config.vocab_size], [-1], []):
                with pytest.raises(ValueError, match="vocabulary|at least one"):
                    await (await server.open(0)).reply(ids, [""], 4)
        assert fakes[0].up and not fakes[0].prompts

    run(work)


def test_a_cancelled_episode_is_aborted_on_its_server(
    world: World, fakes: list[FakeSGLang]
) -> None:
    async def work() -> None:
        async with serving(world, fakes[:1], request_s=20.0) as server:
            fakes[0].token_s = 0.05
            going = asyncio.create_task(episode(world, server, 0, turns=1, max_new=40))
            await until(lambda: fakes[0].running == 1)
            going.cancel()
            await until(lambda: len(fakes[0].aborted) == 1)
            await until(lambda: fakes[0].running == 0)

    run(work)


class Restarter:
    """Restarts a fake; notes how many of all were up at that time."""

    def __init__(self, fake: FakeSGLang, all_of_them: list[FakeSGLang]) -> None:
        self._fake, self._all = fake, all_of_them
        self.others_up: list[int] = []

    def alive(self) -> bool:
        return True

    async def restart(self, snapshot: Snapshot) -> None:
        assert self._fake.running == 0  # drained
        if self._fake.up:
            self._fake.kill()
        self.others_up.append(sum(fake.up for fake in self._all))
        await asyncio.sleep(0.05)
        self._fake.start(snapshot.folder, "")

    async def stop(self) -> None:
        pass


def test_sglang_jax_is_restarted_replica_by_replica(world: World) -> None:
    async def work() -> None:
        fakes = [
            FakeSGLang(world.config, versions=False).start(world.snapshots[0].folder, "")
            for _ in range(2)
        ]
        restarters = [Restarter(fake, fakes) for fake in fakes]
        http = httpx2.AsyncClient(timeout=None, trust_env=False)
        replicas = [
            Replica(fake.url, http, restarter)
            for fake, restarter in zip(fakes, restarters, strict=True)
        ]
        fleet = Fleet(replicas, SGLangJax(drain_s=5.0), world.config, PATIENCE)
        sampling = Sampling((STOP,), TEMPERATURE, lag=1, request_s=5.0)
        server = SGLangServer("rl", fleet, http, world.config.vocab_size, sampling)
        try:
            for version in range(2):
                await publish(world, server, version)
                await until(lambda: len(fleet.serving()) == 2)
                going = [asyncio.create_task(episode(world, server, s)) for s in range(6)]
                if version == 0:
                    await asyncio.sleep(0.02)
                    continue
                found = await asyncio.gather(*going)
                assert {v for versions in found for v in versions} <= {0, 1}
                assert 1 in found[-1]
            assert [len(r.others_up) for r in restarters] == [2, 2]
            assert all(up == 1 for r in restarters for up in r.others_up)  # never both
        finally:
            await server.close()
            for fake in fakes:
                fake.kill()

    run(work)


def test_labels_tell_versions() -> None:
    assert version_of("v000012-abcdef012345") == 12
    for other in ("default", "v12", "rejected", "", "12-ab", "vx-ab"):
        assert version_of(other) is None
