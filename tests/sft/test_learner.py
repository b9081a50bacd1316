"""Where the optimizer's state lies, and what a learner refuses."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from configs.errors import InputError
from model.lora import Lora
from sft.learner import Learner, TrainState, nll
from sft.packing import Example, Rows, pack
from tests.model.conftest import SMALL, random_params


def rows() -> Rows:
    rng = np.random.default_rng(0)
    return pack([Example(rng.integers(0, 101, 20), np.ones(20)) for _ in range(4)], 20, 20)


def trained(offload: bool) -> TrainState:
    learner = Learner(SMALL, optax.adamw(1e-2), nll, offload=offload)
    state = learner.init(random_params(SMALL, 0))
    for _ in range(2):
        state, _ = learner.step(state, [rows()])
    return state


def test_moments_in_the_hosts_memory_change_nothing():
    here, away = trained(False), trained(True)
    kinds = {a.sharding.memory_kind for a in jax.tree.leaves(away.opt_state) if a.ndim}
    assert kinds == {"pinned_host"}
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(away), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_parameters_are_no_master_copy():
    config = replace(SMALL, param_dtype="bfloat16")
    with pytest.raises(InputError, match="float32 parameters, these are bfloat16"):
        Learner(config, optax.sgd(1.0), nll)
    Learner(replace(config, lora=Lora(rank=2)), optax.sgd(1.0), nll)  # adapters are float32
