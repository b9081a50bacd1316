"""The copying circuit copies before any training; random weights do not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.copying import copying_init
from model.qwen3 import Params, init
from tests.model.conftest import SMALL, logits

CONFIG = dataclasses.replace(SMALL, vocab_size=500, hidden_size=192, head_dim=64, rope_theta=1e6)


def loss_on_repetition(params: Params) -> float:
    """Mean negative log-likelihood, in nats, of the second half of random tokens said twice."""
    half = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 100))
    ids = jnp.asarray(np.concatenate([half, half], axis=1))
    logprobs = jax.nn.log_softmax(logits(CONFIG, params, ids))
    taken = jnp.take_along_axis(logprobs[:, 100:-1], ids[:, 101:, None], axis=-1)
    return float(-taken.mean())


def test_it_copies_before_any_training() -> None:
    uniform = np.log(CONFIG.vocab_size)  # 6.2
    assert loss_on_repetition(init(CONFIG, 0)) > uniform
    assert loss_on_repetition(copying_init(CONFIG, 0)) < 1.0


def test_parameters_are_those_of_the_model() -> None:
    plain, copying = init(CONFIG, 3), copying_init(CONFIG, 3)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, copying)


@pytest.mark.parametrize(
    "change", [{"head_dim": 32}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}]
)
def test_a_shape_without_room_for_the_circuit_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="copying_init needs"):
        copying_init(dataclasses.replace(CONFIG, **change), 0)
