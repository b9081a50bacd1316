"""Grouped-query attention: one contract, implementations chosen by config.

The plain XLA one is here; the others have a file each and are imported when they are asked for.

Query heads that share a key head are stacked along the row axis, so that every product is a plain
batched matmul ``[B*K, G*T, hd] @ [B*K, hd, S]`` and keys are never repeated. XLA:CPU runs this
about three times faster than the grouped einsum, and TPU and GPU lower it just as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from configs.errors import InputError

MASKED = -1e30  # finite: a row with nothing to attend to gives numbers, not NaN
QUERY_BLOCK = 256
SAVED = ("attention",)  # the name, for remat policies, of what a backward pass needs of the forward


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, impl: str = "xla"
) -> jax.Array:
    """Causal self-attention over packed rows.

    Args:
        q: [B, T, H, hd]; k, v: [B, T, K, hd], H a multiple of K.
        segments: [B, T] int32; a token sees earlier tokens of its own segment. None: one segment.
        impl: all compute the same.
            "xla": any device, nothing but XLA.
            "splash": a kernel for TPUs (``model/splash.py``).
            "cudnn": NVIDIA GPUs, 16-bit dtypes (``model/cudnn.py``).
            "context": T split over the axis ``context`` of the mesh in force (``model/ring.py``).

    Returns [B, T, H * hd] in q's dtype; scores and softmax in float32. Raises InputError where
    ``impl`` cannot run, see ``check``.
    """
    if impl != "xla":
        check(impl)
    if impl == "splash":
        from model.splash import splash_attend

        return splash_attend(q, k, v, segments)
    if impl == "cudnn":
        from model.cudnn import cudnn_attend

        return cudnn_attend(q, k, v, segments)
    if impl == "context":
        from model.ring import ring_attend

        return ring_attend(q, k, v, segments)
    assert impl == "xla", impl
    b, t, h, hd = q.shape
    kv = k.shape[2]
    q = (q * hd**-0.5).reshape(b, t, kv, h // kv, hd).transpose(0, 2, 3, 1, 4)
    k, v = (z.transpose(0, 2, 1, 3).reshape(b * kv, t, hd) for z in (k, v))
    out = _attend(q, k, v, segments)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h * hd)


def check(impl: str) -> None:
    """Raise InputError if ``attend(..., impl)`` runs on no device that JAX has here.

    ``attend`` asks when it is traced; a program that works for hours before that asks at its start.
    """
    here = f"JAX has {jax.device_count()} {jax.default_backend()} device(s) here"
    if impl == "splash" and platform() == "gpu":
        raise InputError(f"attention splash needs a TPU, {here}: use cudnn or xla")
    if impl == "cudnn":
        try:
            jax.devices("cuda")
        except RuntimeError:
            raise InputError(f"attention cudnn needs an NVIDIA GPU, {here}: use xla") from None


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu" or "tpu".

    The mesh in force (``jax.set_mesh``) says, and without one JAX's default backend. So a program
    can be compiled for a TPU on a machine without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Attention of scaled q [B, K, G, T, hd] over k, v [B*K, T, hd]; like q.

    Queries go in blocks that look at no key behind their end, so half of the work is never done.
    The backward pass recomputes the probabilities from the saved log-sum-exp instead of keeping
    them (https://arxiv.org/abs/2205.14135), with P = exp(S - lse) and D = rowsum(dO * O):

        dV = P^T dO,  dS = P * (dO V^T - D),  dQ = dS K,  dK = dS^T Q
    """
    return _attend_forward(q, k, v, segments)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    outs, lses = [], []
    for start, end in _query_blocks(q.shape[3]):
        scores = _scores(q, k, segments, start, end)
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        mass = p.sum(-1, keepdims=True)
        out = _matmul(_flat(p.astype(v.dtype)), v[:, :end])
        outs.append((out.reshape(*p.shape[:-1], -1) / mass).astype(q.dtype))
        lses.append(top + jnp.log(mass))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), *SAVED)
    lse = checkpoint_name(jnp.concatenate(lses, axis=3), *SAVED)
    return out, (q, k, v, segments, out, lse)


def _attend_backward(
    saved: tuple[jax.Array | None, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, lse = saved
    assert q is not None and k is not None and v is not None
    assert out is not None and lse is not None
    delta = (out.astype(jnp.float32) * d_out).sum(-1, keepdims=True)
    d_qs = []
    # transposed, [B*K, hd, T]: the long axis last makes these two products twice as fast on a CPU
    d_k = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32)
    d_v = d_k
    for start, end in _query_blocks(q.shape[3]):
        rows, d_rows = _flat(q[:, :, :, start:end]), _flat(d_out[:, :, :, start:end])
        p = jnp.exp(_scores(q, k, segments, start, end) - lse[:, :, :, start:end])
        d_p = _matmul(d_rows, v[:, :end].swapaxes(1, 2)).reshape(p.shape)
        d_s = _flat((p * (d_p - delta[:, :, :, start:end])).astype(k.dtype))
        d_k = d_k.at[:, :, :end].add(_matmul(rows.swapaxes(1, 2), d_s))
        d_v = d_v.at[:, :, :end].add(_matmul(d_rows.swapaxes(1, 2), _flat(p.astype(v.dtype))))
        d_qs.append(_matmul(d_s, k[:, :end]).reshape(*p.shape[:-1], -1))
    d_q = jnp.concatenate(d_qs, axis=3).astype(q.dtype)
    return d_q, d_k.swapaxes(1, 2).astype(k.dtype), d_v.swapaxes(1, 2).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    starts = range(0, length, QUERY_BLOCK)
    return [(start, min(start + QUERY_BLOCK, length)) for start in starts]


def _scores(
    q: jax.Array, k: jax.Array, segments: jax.Array | None, start: int, end: int
) -> jax.Array:
    """Masked scores [B, K, G, end - start, end] float32 of one block of queries."""
    b, kv, g, _, _ = q.shape
    visible = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
    if segments is not None:
        visible = visible & (segments[:, start:end, None] == segments[:, None, :end])
    scores = _matmul(_flat(q[:, :, :, start:end]), k[:, :end].swapaxes(1, 2))
    # added, not selected: XLA then makes the mask once for all heads
    bias = jnp.where(visible, 0.0, MASKED)[:, None, None]
    return scores.reshape(b, kv, g, end - start, end) + bias


def _flat(x: jax.Array) -> jax.Array:
    """[B, K, G, t, n] -> [B*K, G*t, n]."""
    b, kv, g, t, n = x.shape
    return x.reshape(b * kv, g * t, n)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def attend_cached(
    q: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    positions: jax.Array,
    blocks: jax.Array,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Attention of new tokens over a cache that already holds their own keys and values.

    The softmax runs block after block with a running maximum (https://arxiv.org/abs/1805.02867).
    A block in which a row sees nothing multiplies by one and adds zero, exactly, so skipping the
    blocks that no row of the batch reaches saves their time and never changes a bit of any row.

    Args:
        q: [B, T, H, hd].
        keys, values: by block, [R, K, hd, block] and [R, K, block, hd]; block i holds positions
            i * block onward.
        positions: [B, T] int32; a query sees entries 0..position.
        blocks: int32 scalar, blocks to look at (at least one).
        rows: [B] int32, the cache row of each query row; None: row i is query row i.

    Returns [B, T, H * hd] in q's dtype.
    """
    b, t, h, hd = q.shape
    kv, block = values[0].shape[1:3]
    g = h // kv
    flat = (q * hd**-0.5).reshape(b, t, kv, g, hd).transpose(0, 2, 3, 1, 4)
    flat = flat.reshape(b * kv, g * t, hd)

    def update(
        state: tuple[jax.Array, ...], k: jax.Array, v: jax.Array, start: int
    ) -> tuple[jax.Array, ...]:
        top, mass, out = state
        k, v = (k, v) if rows is None else (k[rows], v[rows])
        scores = _matmul(flat, k.reshape(b * kv, hd, block)).reshape(b, kv, g, t, block)
        visible = start + jnp.arange(block) <= positions[:, None, None, :, None]
        scores = jnp.where(visible, scores, MASKED).reshape(b * kv, g * t, block)
        new = jnp.maximum(top, scores.max(-1))
        p, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        part = _matmul(p.astype(v.dtype), v.reshape(b * kv, block, hd))
        return new, mass * old + p.sum(-1), out * old[..., None] + part

    state: tuple[jax.Array, ...] = (
        jnp.full((b * kv, g * t), MASKED, jnp.float32),
        jnp.zeros((b * kv, g * t), jnp.float32),
        jnp.zeros((b * kv, g * t, hd), jnp.float32),
    )
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        seen = functools.partial(update, start=i * block)
        state = jax.lax.cond(i < blocks, seen, lambda state, *_: state, state, k, v)
    out = (state[2] / state[1][..., None]).astype(q.dtype)
    return out.reshape(b, kv, g, t, hd).transpose(0, 3, 1, 2, 4).reshape(b, t, h * hd)
