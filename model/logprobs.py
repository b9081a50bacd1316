"""Token log-probabilities and entropies from hidden states: the one place that sees logits.

With z = hidden @ head / temperature, p = softmax(z), y the target:

    logprob = z_y - logsumexp(z)          d logprob / d z_v = [v = y] - p_v
    entropy = logsumexp(z) - sum_v p_v z_v   d entropy / d z_v = -p_v (z_v - sum_u p_u z_u)

Logits exist for one chunk of the vocabulary at a time, forward (a running maximum and sums, as in
https://arxiv.org/abs/1805.02867) and backward (recomputed from the saved logsumexp), so memory is
[N, chunk] whatever the vocabulary.

On a mesh (``model/parallel.py``) each device of a ``tensor`` group has a part of the vocabulary and
all have the same N; the group adds up its sums. The head's rows are gathered chunk by chunk, and
its gradient summed and scattered chunk by chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import MASKED
from model.parallel import TENSOR, WEIGHTS, gather, here, highest, index, scatter_sum, total

CHUNK = 8192


@functools.partial(jax.jit, static_argnames=("chunk",))
def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of its distribution.

    Args:
        hidden: [N, D]; head: [D, V], on a mesh this device's part of it; targets: [N] int32 in
            0..V-1 of the whole vocabulary.
        temperature: positive; divides the logits. Not differentiated.
        chunk: most vocabulary entries held at a time; a vocabulary that fits is one block.

    Returns (logprobs [N], entropies [N]) float32 in nats. Differentiable in hidden and head; the
    devices of a tensor group get the same numbers, and the same derivatives must come back to each.
    """
    chunk = even_chunk(head.shape[1], chunk)
    targets = targets - index(TENSOR) * head.shape[1]  # outside 0..V/tensor-1: of another device
    return _token_logprobs(chunk, hidden, head, targets, jnp.float32(1.0) / temperature)


@functools.partial(jax.jit, static_argnames=("chunk",))
def likeliest(hidden: jax.Array, head: jax.Array, *, chunk: int = CHUNK) -> jax.Array:
    """The vocabulary entry [N] int32 with the largest logit, the lowest of several; as above."""
    chunk = even_chunk(head.shape[1], chunk)

    def body(
        best: tuple[jax.Array, jax.Array], start: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        top, at = best
        _, z, ids = _logits(chunk, start, hidden, head, jnp.float32(1.0))
        here = z.max(-1)
        found = ids[0] + jnp.where(z == here[:, None], jnp.arange(chunk), chunk).min(-1)
        return (jnp.maximum(top, here), jnp.where(here > top, found, at)), None

    n = hidden.shape[0]
    first = (jnp.full(n, 2 * MASKED, jnp.float32), jnp.zeros(n, jnp.int32))
    starts = jnp.arange(0, head.shape[1], chunk)
    return jax.lax.scan(body, first, starts)[0][1]


def even_chunk(v: int, most: int) -> int:
    """The length of v's chunks if all are alike; in whole registers (128) where there are several.

    The last chunk overlaps the one before it, and what overlaps is computed twice.
    """
    if v <= most:
        return v
    count = -(-v // most)
    return min(most, -(-v // (128 * count)) * 128)


class _Sums(NamedTuple):
    """Over the vocabulary seen so far, each [N] float32."""

    top: jax.Array  # max z
    mass: jax.Array  # sum exp(z - top)
    moment: jax.Array  # sum z exp(z - top)
    target: jax.Array  # z of the target, 0 until its chunk comes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(
    chunk: int, hidden: jax.Array, head: jax.Array, targets: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(chunk, hidden, head, targets, scale)[0]


def _logits(
    chunk: int, start: jax.Array, hidden: jax.Array, head: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A chunk's weights [D, chunk] as multiplied, logits [N, chunk] and its columns [chunk].

    The last chunk is moved back to end with the vocabulary; entries that an earlier chunk has
    covered are masked, so nothing is counted twice and the head needs no padding.
    """
    v = head.shape[1]
    begin = jnp.minimum(start, v - chunk)
    weights = jax.lax.dynamic_slice_in_dim(head, begin, chunk, axis=1).astype(hidden.dtype)
    weights = gather(weights, WEIGHTS, 0)
    z = jnp.matmul(hidden, weights, preferred_element_type=jnp.float32) * scale
    ids = begin + jnp.arange(chunk)
    if v % chunk:
        z = jnp.where(ids >= start, z, MASKED)
    return weights, z, ids


def _forward(
    chunk: int, hidden: jax.Array, head: jax.Array, targets: jax.Array, scale: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    n, v = hidden.shape[0], head.shape[1]

    def body(sums: _Sums, start: jax.Array) -> tuple[_Sums, None]:
        _, z, ids = _logits(chunk, start, hidden, head, scale)
        top = jnp.maximum(sums.top, z.max(-1))
        e = jnp.exp(z - top[:, None])
        old = jnp.exp(sums.top - top)
        mass = sums.mass * old + e.sum(-1)
        moment = sums.moment * old + (e * z).sum(-1)
        found = jnp.take_along_axis(z, jnp.clip(targets - ids[0], 0, chunk - 1)[:, None], 1)[:, 0]
        target = sums.target + jnp.where((targets >= start) & (targets <= ids[-1]), found, 0.0)
        return _Sums(top, mass, moment, target), None

    zero = jnp.zeros(n, jnp.float32)
    sums = _Sums(jnp.full(n, MASKED, jnp.float32), zero, zero, zero)
    if chunk == v:
        sums, _ = body(sums, jnp.int32(0))
    else:
        sums, _ = jax.lax.scan(body, sums, jnp.arange(0, v, chunk))
    top = highest(sums.top, TENSOR)
    share = jnp.exp(sums.top - top)
    parts = jnp.stack([sums.mass * share, sums.moment * share, sums.target])
    sums = _Sums(top, *total(parts, TENSOR))
    lse = sums.top + jnp.log(sums.mass)
    mean = sums.moment / sums.mass
    return (sums.target - lse, lse - mean), (hidden, head, targets, scale, lse, mean)


def _backward(
    chunk: int, saved: tuple[jax.Array, ...], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden, head, targets, scale, lse, mean = saved
    g_logprob, g_entropy = (g[:, None] for g in grads)

    def body(
        sums: tuple[jax.Array, jax.Array], start: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        d_hidden, d_head = sums
        weights, z, ids = _logits(chunk, start, hidden, head, scale)
        p = jnp.exp(z - lse[:, None])
        dz = -p * (g_logprob + g_entropy * (z - mean[:, None]))  # 0 where masked: p is 0 there
        dz = dz + jnp.where(ids == targets[:, None], g_logprob, 0.0)
        if v % chunk:  # a target that an earlier chunk has counted
            dz = jnp.where(ids >= start, dz, 0.0)
        dz = (dz * scale).astype(hidden.dtype)
        d_hidden += jnp.matmul(dz, weights.T, preferred_element_type=jnp.float32)
        part = jnp.matmul(hidden.T, dz, preferred_element_type=jnp.float32)
        if here(WEIGHTS):
            part = scatter_sum(part.astype(hidden.dtype), WEIGHTS, 0).astype(jnp.float32)
        if chunk == v:
            return (d_hidden, part), None
        begin = jnp.minimum(start, v - chunk)
        part += jax.lax.dynamic_slice_in_dim(d_head, begin, chunk, axis=1)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, part, begin, axis=1)), None

    v = head.shape[1]
    sums = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
    if chunk == v:
        sums, _ = body(sums, jnp.int32(0))
    else:
        sums, _ = jax.lax.scan(body, sums, jnp.arange(0, v, chunk))
    # The barrier keeps XLA from folding a tied head's transpose into the product that made this,
    # which costs a third of the whole backward pass on a CPU.
    d_head = jax.lax.optimization_barrier(sums[1])
    return sums[0].astype(hidden.dtype), d_head.astype(head.dtype), None, None


_token_logprobs.defvjp(_forward, _backward)
