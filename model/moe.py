"""A mixture of experts: each token goes through its few best experts, and none is ever dropped."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Experts(NamedTuple):
    """Weights of one layer's mixture of E experts."""

    router: jax.Array  # [D, E]
    gate: jax.Array  # [E, D, F]
    up: jax.Array  # [E, D, F]
    down: jax.Array  # [E, F, D]


def mixture(x: jax.Array, experts: Experts, top_k: int, normalize: bool) -> jax.Array:
    """sum over a token's ``top_k`` experts e of p_e · Wdown_e (silu(Wgate_e x) * (Wup_e x)).

    p is the softmax over all experts, in float32; ``normalize`` makes the chosen ones sum to one
    (``norm_topk_prob``). The (token, expert) pairs are sorted by expert, so that every expert does
    one matrix product over its own tokens (``jax.lax.ragged_dot``): shapes are static, no expert
    has a capacity, and the work is that of the chosen experts alone.

    x: [B, T, D]; returns the same shape in x's dtype.
    """
    b, t, d = x.shape
    rows = x.reshape(b * t, d)
    scores = jax.nn.softmax((rows @ experts.router.astype(x.dtype)).astype(jnp.float32), axis=-1)
    weight, expert = jax.lax.top_k(scores, top_k)  # [N, k]
    if normalize:
        weight = weight / weight.sum(-1, keepdims=True)
    order = jnp.argsort(expert.reshape(-1), stable=True)  # pairs by expert
    sizes = jnp.bincount(expert.reshape(-1), length=experts.router.shape[1])

    def product(h: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(h, w.astype(h.dtype), sizes.astype(jnp.int32))

    h = rows[order // top_k]
    h = product(jax.nn.silu(product(h, experts.gate)) * product(h, experts.up), experts.down)
    back = jnp.argsort(order)
    h = h[back].reshape(b * t, top_k, d) * weight[..., None].astype(h.dtype)
    return h.astype(jnp.float32).sum(1).astype(x.dtype).reshape(b, t, d)
