"""GRPO through the real server, learner and checkpoints, on a problem whose answer is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs.errors import InputError
from model.config import Qwen3Config
from model.decode import Engine
from model.qwen3 import Params, init
from rl.inprocess import InProcessServer
from rl.learning import RLConfig
from rl.rollout import Episode
from rl.train import train_rl
from sft.learner import OptimizerConfig
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, Turn, load
from tests.runs import Compilations, steps_of

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
STOP = 63
TEMPERATURE = 0.8
CONFIG = RLConfig(
    steps=8,
    tasks_per_step=4,
    group_size=8,
    row_tokens=32,
    row_targets=16,
    microbatch_rows=8,
    checkpoint_every=2,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, final_fraction=1.0),
)
TASKS: list[Any] = [SimpleNamespace(name=f"say-{n}", first=n) for n in range(1, 6)]


def train(
    run: Path,
    seed: int = 0,
    die_after: int = 0,
    config: RLConfig = CONFIG,
    note: Callable[[], None] = lambda: None,
) -> Params:
    """The bandit: an episode succeeds if every sampled token but the last is even. `note` is called
    after each step."""
    engine = Engine(init(MODEL, 0), MODEL, slots=8, max_len=32, prefill_chunk=4, prefill_rows=4)
    server = InProcessServer(engine, "rl", (STOP,), TEMPERATURE)

    async def one(episode: Episode) -> Trajectory:
        session = await server.open(episode.seed)
        try:
            prompt = [episode.task.first, 40, 41]  # type: ignore[attr-defined]
            reply = await session.reply(prompt, [""], max_new=4)
        finally:
            session.close()
        record = Trajectory(
            episode.task.name, "p", "op", "train", "rl", episode.seed, reply.weight_version, ""
        )
        record.add(prompt, ENVIRONMENT)
        record.add(reply.ids, POLICY, reply.logprobs)
        record.turns.append(Turn("", [], []))
        record.reward = float(all(i % 2 == 0 for i in reply.ids[:2]))
        record.verdict = {"verdict": "pass" if record.reward else "fail"}
        return record

    async def rollout(episodes: Sequence[Episode]) -> list[Trajectory]:
        return list(await asyncio.gather(*map(one, episodes)))

    def on_step(done: int, of: int, values: dict[str, float]) -> None:
        note()
        if done == die_after:
            raise KeyboardInterrupt

    return asyncio.run(
        train_rl(
            config,
            MODEL,
            init(MODEL, 0),
            TASKS,
            run,
            seed=seed,
            temperature=TEMPERATURE,
            rollout=rollout,
            publish=engine.set_params,
            on_step=on_step,
        )
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_what_is_rewarded(tmp_path: Path, seed: int) -> None:
    with Compilations() as compiled:
        train(tmp_path, seed, note=compiled.note)
    success = [step["rl/success"] for step in steps_of(tmp_path)]
    assert success[0] < 0.55
    assert np.mean(success[-2:]) > 0.85
    assert compiled.after(2) == 0


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", die_after=5)
    resumed = train(tmp_path / "cut")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")


def test_what_is_trained_on_was_sampled_by_the_version_before(tmp_path: Path) -> None:
    """Token ids and log-probabilities on record come from the published version, and the learner
    computes the same log-probabilities: on the first update the ratio is 1."""
    train(tmp_path)
    for step, values in enumerate(steps_of(tmp_path)):
        done = load(tmp_path / "trajectories" / f"rl-{step + 1:06d}.jsonl")
        assert {t.weight_version for t in done} == {step}
        assert values["mismatch/mean"] < 1e-5


def test_a_kl_penalty_holds_the_policy_near_its_start(tmp_path: Path) -> None:

    held = replace(CONFIG, loss=replace(CONFIG.loss, kl_coef=5.0))
    train(tmp_path / "free")
    train(tmp_path / "held", config=held)
    free = steps_of(tmp_path / "free")[-1]["rl/success"]
    assert steps_of(tmp_path / "held")[-1]["rl/success"] < free


def test_too_few_tasks_are_refused(tmp_path: Path) -> None:

    with pytest.raises(InputError, match="wants 9 tasks, there are 5"):
        train(tmp_path, config=replace(CONFIG, tasks_per_step=9))
