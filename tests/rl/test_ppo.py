"""PPO with a critic learns the bandit of test_train.py, and resumes to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from rl.experience import AdvantageConfig, CriticConfig
from sft.learner import OptimizerConfig
from tests.rl.test_train import CONFIG, train
from tests.runs import Compilations, steps_of

PPO = dict(
    advantage=AdvantageConfig(kind="gae", whiten=True, lam=1.0),  # the one reward comes last
    epochs=2,
    updates_per_step=2,
)
OWN = CriticConfig("own", OptimizerConfig(learning_rate=1e-2, warmup_steps=1, final_fraction=1.0))


LATER = pytest.mark.service  # they take their time


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=LATER), pytest.param(2, marks=LATER)])
def test_ppo_learns_the_same_from_the_same_start(tmp_path: Path, seed: int) -> None:
    with Compilations() as compiled:
        train(tmp_path, seed, config=replace(CONFIG, critic=OWN, **PPO), note=compiled.note)
    success = [step["rl/success"] for step in steps_of(tmp_path)]
    assert success[0] < 0.55
    assert np.mean(success[-2:]) > 0.85
    assert compiled.after(2) == 0


def test_ppo_with_a_shared_network_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, curriculum=True, critic=CriticConfig("shared"), **PPO)
    whole = train(tmp_path / "whole", config=config)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", die_after=3, config=config)
    resumed = train(tmp_path / "cut", config=config)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")
