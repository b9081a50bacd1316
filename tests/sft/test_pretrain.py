"""Pre-training goes on where it was cut off, and from a policy that it is given."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.errors import InputError
from model.qwen3 import init
from model.tokenizer import Tokenizer
from sft.chat import Renderer
from sft.learner import OptimizerConfig
from sft.pretrain import PretrainConfig, pretrain
from sft.pretrain_rows import RowsAhead, RowsConfig, StepRows, read_functions, write_functions
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
    config = _config(tokenizer)
    rows = StepRows(config, config.mix, FUNCTIONS, Renderer(tokenizer), 3)
    whole = pretrain(config, rows, tmp_path / "whole", seed=3)

    def die(done: int, *_: object) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        pretrain(config, rows, tmp_path / "cut", seed=3, on_step=die)
    resumed = pretrain(config, rows, tmp_path / "cut", seed=3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")


def test_it_begins_with_the_policy_it_is_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All zeros: every token is as likely as any other, whatever the examples are."""
    config = replace(_config(tokenizer), steps=1)
    start = jax.tree.map(np.zeros_like, init(config.model, 0))
    rows = StepRows(config, config.mix, FUNCTIONS, Renderer(tokenizer), 3)
    pretrain(config, rows, tmp_path, seed=3, start=start)
    (step,) = steps_of(tmp_path)
    assert step["pretrain/loss"] == pytest.approx(np.log(tokenizer.vocab_size), rel=1e-5)


def test_rows_made_ahead_by_other_processes_are_those_made_in_turn(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config, mix = RowsConfig(batch_rows=2, row_tokens=384, row_targets=192, workers=2), MixConfig()
    tokenizer.save(tmp_path / "tokenizer")
    write_functions(tmp_path / "functions.gz", FUNCTIONS, ["b", "a"])
    assert read_functions(tmp_path / "functions.gz", ["a", "b"]) == FUNCTIONS
    with pytest.raises(InputError, match="from the libraries a, b: "):
        read_functions(tmp_path / "functions.gz", ["a"])
    assert read_functions(tmp_path / "functions.gz") == FUNCTIONS
    ahead = RowsAhead(config, mix, tmp_path / "functions.gz", tmp_path / "tokenizer", 3)
    in_turn = StepRows(config, mix, FUNCTIONS, Renderer(tokenizer), 3)
    pairs = list(zip(ahead.between(2, 14), in_turn.between(2, 14), strict=True))
    assert len(pairs) == 12
    for a, b in pairs:
        jax.tree.map(np.testing.assert_array_equal, a, b)
