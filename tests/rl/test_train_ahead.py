"""Learning while rollouts run ahead, through the real engine and learner; see test_train.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs.errors import Preempted
from model.config import Qwen3Config
from model.decode import Engine
from model.qwen3 import Params, init
from rl.inprocess import InProcessServer
from rl.learning import RLConfig
from rl.rollout import Episode
from rl.train_ahead import train_ahead
from sft.learner import OptimizerConfig
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, Turn, load
from tests.runs import steps_of

MODEL = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)
TEMPERATURE = 0.8
TASKS: list[Any] = [SimpleNamespace(name=f"say-{n}", first=n) for n in range(1, 6)]
CONFIG = RLConfig(
    steps=10,
    tasks_per_step=4,
    group_size=8,
    row_tokens=32,
    row_targets=16,
    microbatch_rows=8,
    checkpoint_every=5,
    max_staleness=2,
    spare=1,
    weight_cap=2.0,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, final_fraction=1.0),
)


def train(run: Path, config: RLConfig = CONFIG, die_at: int = 0) -> list[int]:
    """The bandit of test_train.py; the versions that were published."""
    engine = Engine(init(MODEL, 0), MODEL, slots=8, max_len=32, prefill_chunk=4, prefill_rows=4)
    server = InProcessServer(engine, "rl", (63,), TEMPERATURE)
    published: list[int] = []

    async def roll(episode: Episode) -> Trajectory:
        session = await server.open(episode.seed)
        try:
            prompt = [episode.task.first, 40, 41]  # type: ignore[attr-defined]
            reply = await session.reply(prompt, [""], max_new=4)
        finally:
            session.close()
        record = Trajectory(episode.task.name, "p", "op", "train", "rl", episode.seed, -1, "")
        record.add(prompt, ENVIRONMENT)
        record.add(reply.ids, POLICY, reply.logprobs, reply.versions)
        record.turns.append(Turn("", [], []))
        record.reward = float(all(i % 2 == 0 for i in reply.ids[:2]))
        record.verdict = {"verdict": "pass" if record.reward else "fail"}
        return record

    async def serve(made: tuple[Params, int]) -> None:
        params, version = made
        if die_at and version == die_at:
            raise OSError("no server left")
        engine.set_params(params, version)
        published.append(version)

    asyncio.run(
        train_ahead(
            config,
            MODEL,
            init(MODEL, 0),
            TASKS,
            run,
            seed=0,
            temperature=TEMPERATURE,
            roll=roll,
            copy=lambda params, version: jax.tree.map(np.array, params),
            write=lambda params, version: (params, version),
            serve=serve,
        )
    )
    return published


def test_it_learns_from_tokens_that_are_new_enough(tmp_path: Path) -> None:
    published = train(tmp_path)
    assert published[0] == 0 and published[-1] == CONFIG.steps
    assert published == sorted(set(published))
    steps = steps_of(tmp_path)
    assert len(steps) == CONFIG.steps
    assert np.mean([s["rl/success"] for s in steps[-2:]]) > 0.7
    assert steps[0]["rl/success"] < 0.5  # by chance a quarter
    for number, values in enumerate(steps):
        assert values["stale/max"] <= CONFIG.max_staleness
        done = load(tmp_path / "trajectories" / f"rl-{number + 1:06d}.jsonl")
        assert len(done) == CONFIG.tasks_per_step * CONFIG.group_size
        ages = [number - v for t in done for v in t.versions if v >= 0]
        assert min(ages) >= 0 and max(ages) <= CONFIG.max_staleness
        assert values["stale/mean"] == pytest.approx(np.mean(ages))
        # what was sampled by the very policy that learns from it, both compute alike
        if max(ages) == 0:
            assert values["mismatch/max"] < 1e-4
    assert any(values["stale/max"] > 0 for values in steps)


def test_a_failed_publication_ends_the_run_and_it_resumes(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, checkpoint_every=1)
    with pytest.raises(OSError, match="no server left"):
        train(tmp_path, config, die_at=2)
    assert train(tmp_path, config)[-1] == config.steps
    assert [s["step"] for s in steps_of(tmp_path)] == list(range(1, config.steps + 1))


def test_a_notice_saves_the_last_step_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps=4, checkpoint_every=10)
    asked = iter([False, True])
    monkeypatch.setattr("rl.train_ahead.noticed_by_any", lambda: next(asked, False))
    with pytest.raises(Preempted, match="has saved step 2 of 4"):
        train(tmp_path, config)
    assert train(tmp_path, config)[0] == 2
    assert [s["step"] for s in steps_of(tmp_path)] == [1, 2, 3, 4]
