"""A model small enough that every test compiles in a second or two."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Qwen3Config
from model.qwen3 import Params, abstract, bind

SMALL = Qwen3Config(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    max_position_embeddings=512,
    scan_layers=False,
)


def random_params(config: Qwen3Config, seed: int) -> Params:
    """Parameters with something at work everywhere: `init` starts blocks as the identity and all
    scales at one, so that a part that is left out, or a scale forgotten, would not show."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, spec: jax.ShapeDtypeStruct) -> jax.Array:
        if "norm" in path[-1].key:
            value = rng.uniform(0.5, 1.5, spec.shape)
        else:
            value = rng.normal(size=spec.shape) * 0.7 * spec.shape[-2] ** -0.5
        return jnp.asarray(value, spec.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract(config))


@pytest.fixture(scope="session")
def small() -> Qwen3Config:
    return SMALL


@pytest.fixture(scope="session")
def small_params() -> Params:
    return random_params(SMALL, 0)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Qwen3Config, params: Params, ids: jax.Array) -> jax.Array:
    """Plain full forward: logits [B, T, V] of ids [B, T]."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model(ids, positions)[0] @ model.head()
