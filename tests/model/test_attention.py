"""attend() against attention written out, values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention
from model.attention import attend

B, T, H, K, HD = 2, 21, 4, 2, 6
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 4, [1] * 21], np.int32)


def _written_out(q, k, v, segments):
    """Head by head, query by query; no blocks, no grouping."""
    index = jnp.arange(T)
    visible = index[:, None] >= index[None, :]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    visible = jnp.broadcast_to(visible, (B, T, T))
    heads = []
    for h in range(H):
        scores = jnp.einsum("btd,bsd->bts", q[:, :, h], k[:, :, h // (H // K)]) / HD**0.5
        p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        heads.append(jnp.einsum("bts,bsd->btd", p, v[:, :, h // (H // K)]))
    return jnp.concatenate(heads, -1)


@pytest.mark.parametrize("block", [8, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(monkeypatch, block, packed):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    keys = jax.random.split(jax.random.key(0), 4)
    q = 2 * jax.random.normal(keys[0], (B, T, H, HD))
    k, v = (jax.random.normal(key, (B, T, K, HD)) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], (B, T, H * HD))
    segments = jnp.asarray(SEGMENTS) if packed else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *qkv):
        out, pull = jax.vjp(lambda *x: function(*x, segments), *qkv)
        return out, *pull(cotangent)

    for ours, golden in zip(run(attend, q, k, v), run(_written_out, q, k, v), strict=True):
        np.testing.assert_allclose(ours, golden, atol=1e-5)
