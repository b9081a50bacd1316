"""Sums over whole sequences, wherever their tokens lie.

A row holds several sequences, told apart by segment, and on a mesh with a ``context`` axis each
device holds a stretch of each row. A sequence is never cut over rows, so a sum over its tokens is a
sum over this row's segment, on this device and then over ``context``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.parallel import CONTEXT, count, total
from sft.packing import Rows


def target_segments(rows: Rows) -> jax.Array:
    """The segment that each target slot belongs to, int32 [rows, targets]; unused slots: any."""
    if rows.source is None:
        return rows.segments
    return jnp.take_along_axis(rows.segments, rows.source, axis=1)


def sequence_sum(x: jax.Array, segment: jax.Array, tokens: int) -> jax.Array:
    """For each slot, the sum of ``x`` over all slots of its sequence; 0 counts for nothing.

    Args:
      x, segment: [rows, targets] of this device.
      tokens: tokens in this device's part of a row: there are no more segments than tokens.
    """
    bins = tokens * count(CONTEXT) + 1
    rows = jnp.arange(len(x))[:, None]
    sums = total(jnp.zeros((len(x), bins), x.dtype).at[rows, segment].add(x), CONTEXT)
    return jnp.take_along_axis(sums, segment, axis=1)
