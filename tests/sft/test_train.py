"""SFT resumes bit for bit, and nothing about the cutting into batches changes the gradient."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.errors import InputError
from model.config import Qwen3Config
from model.qwen3 import init
from model.tokenizer import Tokenizer
from sandbox.agent_tools import ToolCall
from sft.chat import Renderer
from sft.examples import Examples
from sft.learner import Learner, OptimizerConfig, nll
from sft.packing import Example, microbatches, pack
from sft.teacher import RUN, SUBMIT, VIEW
from sft.train import SFTConfig, sft_loop, train_sft
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, Turn
from tests.runs import Compilations, steps_of

MODEL = Qwen3Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)
CONFIG = SFTConfig(
    epochs=2,
    batch_rows=4,
    microbatch_rows=2,
    row_tokens=48,
    row_targets=48,
    checkpoint_every=2,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
)


def data(count: int = 24) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(1, 64, n).tolist(), [0.0] * 3 + [1.0] * (n - 3))
        for n in rng.integers(8, 40, count)
    ]


def _trajectory(renderer: Renderer, replies: list[list[ToolCall]], verdict: str) -> Trajectory:
    """An episode of these replies, each answered."""
    t = Trajectory("t", "p", "o", "train", "teacher", 0, -1, "Repair it.")
    t.add(renderer.prompt(t.prompt), ENVIRONMENT)
    for calls in replies:
        t.add(renderer.reply(calls), POLICY)
        t.turns.append(Turn("", [asdict(call) for call in calls], ["answer"] * len(calls)))
        t.add(renderer.observation(["answer"] * len(calls)), ENVIRONMENT)
    t.verdict = {"verdict": verdict}
    return t


def test_loss_is_on_the_turns_that_stood(tokenizer: Tokenizer) -> None:
    """Guesses taken back are context; all else that the policy wrote is learnt, and no more."""

    def edit(new: str, undo: bool) -> ToolCall:
        return ToolCall("edit", {"old": "a", "new": new} | ({"undo": True} if undo else {}))

    renderer = Renderer(tokenizer)
    first, last = edit("b", False), edit("d", True)
    replies = [[RUN, VIEW], [first, RUN], [edit("c", True), RUN], [VIEW], [last, RUN], [SUBMIT]]
    built_on = [[first, RUN], [edit("c", False), RUN]]
    cases = [(replies, (0, 3, 4, 5)), (replies[:2], (0, 1)), (built_on, (0, 1))]
    for written, stood in cases:
        (example,) = Examples([_trajectory(renderer, written, "pass")])
        learnt = [i for i, w in zip(example.ids, example.weight, strict=True) if w]
        assert set(example.weight) == {0.0, 1.0}
        assert learnt == [i for turn in stood for i in renderer.reply(written[turn])]
    assert len(Examples([_trajectory(renderer, replies, "fail")])) == 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    start = init(MODEL, 0)
    whole = train_sft(CONFIG, MODEL, start, data(), tmp_path / "whole", seed=3)

    def die(done: int, *_: object) -> None:
        if done == stop_after:
            raise Killed

    with pytest.raises(Killed):
        train_sft(CONFIG, MODEL, start, data(), tmp_path / "cut", seed=3, on_step=die)
    resumed = train_sft(CONFIG, MODEL, start, data(), tmp_path / "cut", seed=3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")


def test_the_seed_decides_the_order_and_all_is_compiled_by_the_second_update(
    tmp_path: Path,
) -> None:
    start = init(MODEL, 0)
    losses = []
    for seed in (1, 2):
        with Compilations() as compiled:
            run = tmp_path / str(seed)
            train_sft(CONFIG, MODEL, start, data(), run, seed=seed, on_step=compiled.note)
        assert compiled.after(2) == 0
        losses.append([line["sft/loss"] for line in steps_of(tmp_path / str(seed))])
    assert losses[0] != losses[1]


def test_a_ctrl_c_ends_it_after_the_update_under_way(tmp_path: Path) -> None:
    """What asyncio makes of the first one: the task is cancelled."""
    done: list[int] = []

    async def go() -> None:
        task = asyncio.current_task()
        assert task is not None

        def on_step(step: int, *_: object) -> None:
            done.append(step)
            task.cancel()

        start = init(MODEL, jax.random.key(0))
        await sft_loop(CONFIG, MODEL, start, data(), tmp_path, seed=0, on_step=on_step)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(go())
    assert done == [1]


def test_a_single_task_cannot_be_shared_out(tokenizer: Tokenizer) -> None:
    one = _trajectory(Renderer(tokenizer), [[VIEW]], "pass")
    with pytest.raises(InputError, match="of one task, t: "):
        Examples([one]).split(0.1, 0)
    two = replace(one, task="u")
    assert [len(part) for part in Examples([one, two]).split(0.9, 0)] == [1, 1]


def test_nothing_to_train_on_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no verified trajectory"):
        train_sft(CONFIG, MODEL, init(MODEL, 0), [], tmp_path / "run", seed=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("length", "size"), [(48, 2), (48, 5), (96, 1), (200, 3)])
def test_packing_and_microbatches_change_only_rounding(length: int, size: int) -> None:
    """One update from any cutting equals one from unpacked rows, one example each."""
    learner = Learner(MODEL, OptimizerConfig(warmup_steps=0).build(5), nll)

    def updated(rows, count: int):
        state, metrics = learner.step(learner.init(init(MODEL, 0)), microbatches(rows, count))
        return metrics

    alone = [pack([example], 48, 48) for example in data(9)]
    rows = jax.tree.map(lambda *arrays: np.concatenate(arrays), *alone)
    want, found = updated(rows, 9), updated(pack(data(9), length, length), size)
    assert found["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
