"""Validation, early stop, best checkpoint and the guard against loss spikes, resumed exactly."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.errors import InputError
from model.qwen3 import init
from sft.learner import Learner, OptimizerConfig, nll
from sft.packing import Example, microbatches, pack
from sft.stopping import History, SpikeConfig, ValidationConfig
from sft.train import Speed, sft_loop, train_sft
from tests.runs import steps_of
from tests.sft.test_train import CONFIG, MODEL, Killed, data

HELD = data(30)[24:]  # not among the others


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_the_guard_waits_for_a_window_and_then_takes_its_median() -> None:
    history = History(SpikeConfig(factor=2.0, window=3, stop=2), ValidationConfig())
    for loss in (1.0, 3.0):
        assert history.limit == math.inf
        history.see({"sft/loss": loss})
    history.see({"sft/loss": 2.0})
    assert history.limit == 2.0 * 2.0
    history.see({"sft/loss": 9.0, "sft/skipped": 1.0})  # left out: no part of what is usual
    assert history.limit == 4.0 and history.skipped == 1 and not history.diverged
    history.see({"sft/loss": 9.0, "sft/skipped": 1.0})
    assert history.diverged and "above 4 (sft.spikes)" in history.trouble
    history.see({"sft/loss": 4.0, "sft/skipped": 0.0})
    assert history.limit == 2.0 * 3.0 and not history.diverged and history.skipped == 2
    assert History(SpikeConfig(), ValidationConfig()).limit is None


def test_patience_counts_validations_without_a_gain() -> None:
    history = History(SpikeConfig(), ValidationConfig(patience=2, min_gain=0.1))
    for loss, waited in ((2.0, 0), (1.95, 1), (1.8, 0), (1.75, 1), (math.nan, 2)):
        assert not history.done
        history.see({"sft/loss": 1.0, "sft/validation_loss": loss})
        history.see({"sft/loss": 1.0})
        assert history.waited == waited
    assert history.done


@pytest.mark.service  # tens of seconds
def test_an_update_that_is_left_out_changes_nothing_but_the_step() -> None:
    learner = Learner(MODEL, OptimizerConfig(warmup_steps=0).build(5), nll)
    rows = microbatches(pack(data(6), 48, 48), 2)
    broken = [r._replace(weight=(r.weight * math.nan).astype(np.float32)) for r in rows]
    start = jax.tree.map(np.asarray, learner.init(init(MODEL, 0)))
    for batches, limit, skipped in (
        *((rows, 0.5, True), (rows, math.inf, False)),
        *((broken, 0.5, True), (broken, math.inf, True)),
    ):
        state, metrics = learner.step(learner.init(init(MODEL, 0)), batches, limit)
        assert metrics["skipped"] == float(skipped) and int(state.step) == 1
        assert same(state.params, start.params) == same(state.opt_state, start.opt_state) == skipped
        if not skipped:  # one that is made is the one without a guard
            plain, _ = learner.step(learner.init(init(MODEL, 0)), rows)
            assert same(plain, state)


def test_the_loss_is_that_of_the_weights_after_the_update(tmp_path: Path) -> None:
    rules = ValidationConfig(every=3)
    config = replace(CONFIG, validation=rules)
    params = train_sft(config, MODEL, init(MODEL, 0), data(), tmp_path, seed=0, held_back=HELD)
    rows = steps_of(tmp_path)
    found = {
        row["step"]: row["sft/validation_loss"] for row in rows if "sft/validation_loss" in row
    }
    assert len(rows) % 3 and list(found) == [*range(3, len(rows), 3), len(rows)]
    learner = Learner(MODEL, OptimizerConfig().build(1), nll)
    alone = [pack([example], 48, 48) for example in HELD]
    total = sum((r.weight * learner.logprobs(params, r)).sum() for r in alone)
    want = -total / sum(r.weight.sum() for r in alone)
    assert found[len(rows)] == pytest.approx(want, rel=1e-5)


@pytest.mark.service  # tens of seconds
def test_resumed_anywhere_it_ends_where_it_would_have(tmp_path: Path) -> None:
    """A rate so high that validation turns for the worse, and losses that the guard leaves out."""
    config = replace(
        CONFIG,
        epochs=4,
        optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=0, clip_norm=1e3),
        validation=ValidationConfig(every=3, patience=2, best=1),
        spikes=SpikeConfig(factor=1.02, window=3, stop=99),
    )

    def run(name: str, stop: int = 0) -> Any:
        def die(done: int, *_: object) -> None:
            if done == stop:
                raise Killed

        start, more = init(MODEL, 0), {"seed": 1, "held_back": HELD, "on_step": die}
        return train_sft(config, MODEL, start, data(), tmp_path / name, **more)

    whole = run("whole")
    rows = steps_of(tmp_path / "whole")
    skipped = [row["sft/skipped"] for row in rows]
    assert 0 < sum(skipped) < len(rows)
    losses = {row["step"]: row.get("sft/validation_loss") for row in rows}
    scored = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(scored, key=lambda step: (scored[step], -step))
    assert best < len(rows)  # what it ends with is not the last
    assert len(rows) == best + 2 * 3  # two validations after the best, and no more
    with pytest.raises(Killed):
        run("cut", 8)  # that was left out
    assert same(run("cut"), whole) and steps_of(tmp_path / "cut") == rows
    again = run("whole")  # nothing is left to do, and it is the best again
    assert same(again, whole) and steps_of(tmp_path / "whole") == rows


def test_losses_that_stay_above_the_guard_end_it(tmp_path: Path) -> None:
    broken = [Example(e.ids, [w * math.nan for w in e.weight]) for e in data()]
    config = replace(CONFIG, spikes=SpikeConfig(factor=3.0, stop=3))
    with pytest.raises(InputError, match="up to update 3 3 updates in a row were left out"):
        train_sft(config, MODEL, init(MODEL, 0), broken, tmp_path, seed=0)


def test_episodes_in_between_see_the_policy_and_speed_is_per_token(tmp_path: Path) -> None:
    seen: list[tuple[int, Any]] = []

    async def play(done: int, params: Any) -> float:
        seen.append((done, jax.tree.map(np.asarray, params)))
        return done / 100

    config = replace(CONFIG, validation=ValidationConfig(success_every=5))
    speed = Speed(token_flops=1e9, peak_flops=1e13)
    start = init(MODEL, 0)
    work = sft_loop(config, MODEL, start, data(), tmp_path, seed=0, success=play, speed=speed)
    params = asyncio.run(work)
    rows = steps_of(tmp_path)
    found = {r["step"]: r["sft/heldout_success"] for r in rows if "sft/heldout_success" in r}
    assert found == {step: step / 100 for step, _ in seen} and list(found) == [5, 10][: len(found)]
    assert not same(seen[0][1], start) and (len(rows) % 5 or same(seen[-1][1], params))
    assert speed.of(500, 0.25) == {"time/tflops": 2.0, "time/mfu": 0.2}
    assert Speed(1e9).of(500, 0.25) == {"time/tflops": 2.0}
