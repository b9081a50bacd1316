"""What a Pallas kernel costs: HLO shows its operands, not its work.

JAX's splash attention leaves no cost estimate in the program (0.10.2), so it is counted here from
operand shapes, tile sizes (``xprof_metadata``, written by the kernel) and its name. A kernel with a
cost estimate of its own is taken at its word, and one with neither is not counted but reported.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from tools.plan.hlo_text import Computation, Instruction

TARGET = "tpu_custom_call"

# Matrix products for each visited tile of the scores, each 2 * rows * columns * head size FLOPs:
# S = QK', O = PV; the backward kernels make S and dP = dO V' again (https://arxiv.org/abs/2205.14135).
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


class Work(NamedTuple):
    """FLOPs, and bytes read again on top of every operand once (in and out of HBM)."""

    flops: float
    rereads: float


def work(where: Computation, kernel: Instruction) -> Work | None:
    """The work of one execution of a ``tpu_custom_call``; None where nothing tells it."""
    name = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{kernel.name} {kernel.op_name}")
    if name:
        return _splash(where, kernel, name[1])
    told = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', kernel.config)
    return Work(float(told[1]), 0.0) if told else None


def _splash(where: Computation, kernel: Instruction, which: str) -> Work:
    """Causal attention: the tiles that reach the diagonal or lie below it.

    q [(B,) H, T, hd], k and v [(B,) K, S, hd] are the first three operands of floating point. The
    tile of queries stays while keys and values come by (and the other way round for dkv), so these
    are read once for every visited tile. Rows that see keys of another length see all of them: then
    the mask is not the plain causal one, and nothing is skipped.
    """
    arrays = [array for name in kernel.operands for array in where[name].arrays]
    q, k, v = [a for a in arrays if "f" in a.dtype and len(a.dims) >= 3][:3]
    (rows, hd), columns = q.dims[-2:], k.dims[-2]
    heads = q.size // (rows * hd)
    suffix = {"fwd": ("q", "kv"), "dq": ("q_dq", "kv_dq"), "dkv": ("q_dkv", "kv_dkv")}[which]
    high, wide = _block(kernel, suffix[0], rows), _block(kernel, suffix[1], columns)
    tiles = heads * _causal_tiles(rows, columns, high, wide)
    products = _PRODUCTS[which]
    if any(len(a.dims) == len(q.dims) + 1 for a in kernel.arrays):
        products += 1  # the fused backward pass: dq by tiles of keys, to be summed
    # q and dO come by in dkv, keys and values in the others; what lies in VMEM costs nothing
    passing, lines = ((q, q), high) if which == "dkv" else ((k, v), wide)
    moved = sum(tiles * lines * a.dims[-1] * a.bytes / a.size for a in passing if not a.space)
    once = sum(a.bytes for a in passing if not a.space)
    return Work(2.0 * products * tiles * high * wide * hd, max(0.0, moved - once))


def _causal_tiles(rows: int, columns: int, high: int, wide: int) -> int:
    """Tiles of a [rows, columns] score matrix that hold a pair which is not masked."""
    down, across = math.ceil(rows / high), math.ceil(columns / wide)
    if rows != columns:
        return down * across
    return sum(min(across, math.ceil((i + 1) * high / wide)) for i in range(down))


def _block(kernel: Instruction, which: str, length: int) -> int:
    """A tile's size, from the metadata that the kernel writes."""
    found = re.search(rf'\\"block_{which}\\": (\d+)', kernel.attributes)
    return min(int(found[1]), length) if found else length
