"""Pre-training goes on where it was cut off, and from a policy that it is given."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from model.qwen3 import init
from model.tokenizer import Tokenizer
from sft.chat import Renderer
from sft.learner import OptimizerConfig
from sft.pretrain import PretrainConfig, pretrain
from sft.synthetic import Function, MixConfig, extract
from tests.model.conftest import SMALL
from tests.runs import steps_of

FUNCTIONS: list[Function] = list(extract("random.py", Path(random.__file__).read_text()))


class Killed(Exception):
    pass


def _config(tokenizer: Tokenizer) -> PretrainConfig:
    return PretrainConfig(
        model=replace(SMALL, vocab_size=tokenizer.vocab_size, hidden_size=128, head_dim=64),
        steps=5,
        batch_rows=2,
        row_tokens=384,
        row_targets=192,
        checkpoint_every=2,
        mix=MixConfig(tries=0.5),
        optimizer=OptimizerConfig(warmup_steps=1),
    )


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config, renderer = _config(tokenizer), Renderer(tokenizer)
    whole = pretrain(config, FUNCTIONS, renderer, tmp_path / "whole", seed=3)

    def die(done: int, *_: object) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        pretrain(config, FUNCTIONS, renderer, tmp_path / "cut", seed=3, on_step=die)
    resumed = pretrain(config, FUNCTIONS, renderer, tmp_path / "cut", seed=3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")


def test_it_begins_with_the_policy_it_is_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All zeros: every token is as likely as any other, whatever the examples are."""
    config = replace(_config(tokenizer), steps=1)
    start = jax.tree.map(np.zeros_like, init(config.model, 0))
    pretrain(config, FUNCTIONS, Renderer(tokenizer), tmp_path, seed=3, start=start)
    (step,) = steps_of(tmp_path)
    assert step["pretrain/loss"] == pytest.approx(np.log(tokenizer.vocab_size), rel=1e-5)
