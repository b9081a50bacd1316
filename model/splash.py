"""Splash attention: JAX's Pallas kernel for TPUs, behind the contract of ``model/attention.py``.

The kernel is blockwise in both directions and skips the blocks above the diagonal, so neither pass
holds more than a tile of the probabilities. See
``jax.experimental.pallas.ops.tpu.splash_attention``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from model.attention import SAVED, platform

LANES = 128  # a TPU register's width: the kernel takes sequences in multiples of it
BLOCK = 512  # rows and columns of a tile


@jax.jit  # traced once for all layers: listing the visible tiles takes a while, 5 s at 32k tokens
def splash_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """``attend(..., impl="splash")``: same shapes and dtypes, any T and hd.

    The kernel sees one device's rows and heads and cannot be partitioned by the compiler, so on a
    mesh it needs a ``jax.shard_map(..., check_vma=False)`` around it, as the learner's is: its
    outputs do not say over which mesh axes they vary.

    On a CPU the kernel is interpreted, which is slow: for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    b, t, h, hd = q.shape
    length = -(-t // LANES) * LANES
    # Padding is at the end, where causality hides it from every real token, whatever its segment.
    pad = [(0, 0), (0, length - t)]
    q, k, v = (jnp.pad(z, [*pad, (0, 0), (0, 0)]).swapaxes(1, 2) for z in (q * hd**-0.5, k, v))
    ids = None
    if segments is not None:
        segments = jnp.pad(segments, pad)
        ids = splash.SegmentIds(q=segments, kv=segments)

    block = math.gcd(length, BLOCK)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * h)
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() == "cpu",
        residual_checkpoint_name=SAVED[0],
    )
    out = jax.vmap(kernel)(q, k, v, ids)  # one row: [H, T, hd] over [K, T, hd]
    return out.swapaxes(1, 2)[:, :t].reshape(b, t, h * hd)
