"""Rotary position embedding (https://arxiv.org/abs/2104.09864), plain and YaRN-scaled.

Frequencies are computed once on the host, in float32 as transformers does, so that the angle of a
far position is the same to the last bit that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import InputError


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (https://arxiv.org/abs/2309.00071), under transformers' field names.

    ``attention_factor`` multiplies cos and sin; None derives it from ``factor`` (§3.4 of the paper:
    0.1 ln(factor) + 1), or from ``mscale`` and ``mscale_all_dim`` where both are given.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise InputError(
                "rope scaling: yarn needs factor >= 1 and original_max_position_embeddings >= 1, "
                f"got {self.factor} and {self.original_max_position_embeddings}"
            )

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied with."""

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


def frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> np.ndarray:
    """Radians per position of each pair of channels, float32 [hd/2]: theta^(-2i/hd).

    With YaRN, channels that turn more than ``beta_fast`` times within the original context keep
    their frequency, those that turn less than ``beta_slow`` times are slowed down by ``factor``,
    and the ones between are blended linearly in the channel number.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    period = np.float32(theta) ** exponent
    if yarn is None:
        return np.float32(1.0) / period

    def channel(turns: float) -> float:
        """The (fractional) pair of channels that turns so often within the original context."""
        length = yarn.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    slowed = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    plain, stretched = 1.0 / period, 1.0 / (np.float32(yarn.factor) * period)
    return (stretched * slowed + plain * (1.0 - slowed)).astype(np.float32)


def rope_tables(
    positions: jax.Array, head_dim: int, theta: float, yarn: Yarn | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, hd/2] float32 of position times frequency; positions [B, T]."""
    rates = jnp.asarray(frequencies(head_dim, theta, yarn))
    angle = positions[..., None, None].astype(jnp.float32) * rates
    amplitude = 1.0 if yarn is None else yarn.amplitude
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the two halves of each head [B, T, N, hd] in float32, back in x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
