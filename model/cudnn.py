"""Flash attention of cuDNN, for NVIDIA GPUs, behind the contract of ``model/attention.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from configs.errors import InputError


def cudnn_attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """``attend(..., impl="cudnn")``: same shapes, bfloat16 or float16.

    Packed rows cost memory: JAX's public interface has no segments, so they go in as a mask that
    becomes a [B, 1, T, T] bias, and cuDNN writes a gradient of the same size for it. One segment a
    row needs neither.

    Raises InputError for another dtype. Head sizes above 128 (256 from Hopper on) are refused by
    JAX.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(f"attention cudnn computes in bfloat16 or float16, got {q.dtype}")
    b, t, h, hd = q.shape
    # cuDNN wants heads in eights and, with a bias, an even length. Padded tokens are at the end,
    # where causality hides them from every real one, whatever their segment.
    pad = [(0, 0), (0, t % 2), (0, 0), (0, -hd % 8)]
    q, k, v = (jnp.pad(z, pad) for z in (q, k, v))
    mask = None
    if segments is not None:
        segments = jnp.pad(segments, pad[:2])
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=hd**-0.5, is_causal=True, implementation="cudnn"
    )
    return out[:, :t, :, :hd].reshape(b, t, h * hd)
