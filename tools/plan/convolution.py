"""FLOPs of a matrix product. XLA:TPU has only convolutions: it makes every ``dot`` one."""

from __future__ import annotations

import re

import numpy as np

from tools.plan.hlo_text import Computation, Instruction


def flops(where: Computation, instruction: Instruction) -> float:
    """2 · (multiply-adds) of a ``dot`` or ``convolution``, those with padding or holes left out."""
    left, right = (where.operand(instruction, i).array.dims for i in (0, 1))
    result = instruction.array
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2.0 * result.size * float(np.prod([left[int(d)] for d in contracted]))

    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    assert labels, instruction.attributes[:200]
    window = _window(instruction.attribute("window") or "{}")
    # Each element of the result sums over the kernel's input features and, along each spatial
    # dimension, over the places of the kernel that meet an element of the input. Groups of features
    # or of the batch are in these sizes already.
    total = result.dims[labels[3].index("b")] * result.dims[labels[3].index("f")]
    total *= right[labels[2].index("i")]
    for axis in range(len(labels[1]) - 2):
        key = str(axis)
        total *= _meetings(
            left[labels[1].index(key)],
            right[labels[2].index(key)],
            result.dims[labels[3].index(key)],
            {name: values[axis] for name, values in window.items()},
        )
    return 2.0 * total


def _meetings(inputs: int, kernel: int, outputs: int, window: dict[str, str]) -> int:
    """Pairs (place of the result, place of the kernel) that fall on an element of the input.

    A batch dimension of a ``dot`` is a spatial dimension of size B here, with a window of size B,
    stride B-1 and input dilation B: then it is B of the B² pairs.
    """
    stride, spread, step = (int(window.get(k, 1)) for k in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None, :] * step - before
    met = (at % spread == 0) & (at >= 0) & (at < (inputs - 1) * spread + 1)
    return int(met.sum())


def _window(text: str) -> dict[str, list[str]]:
    """``{size=3x5 stride=2x4}`` as values by axis."""
    return {
        key: re.findall(r"-?\d+_-?\d+|\d+", values)
        for key, values in re.findall(r"(\w+)=(\S+?)(?=[\s}])", text)
    }
