"""What the speed of a run's training is measured by, on the devices of this run."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from model.config import Qwen3Config
from sft.train import Speed
from tools.plan.chips import CHIPS
from tools.plan.flops import per_token


def speed(
    config: Qwen3Config,
    length: int,
    targets: int,
    sizes: Sequence[tuple[int, int]],
    devices: int,
) -> Speed:
    """Of rows of `length` tokens that hold examples of `sizes`, on `devices` of this kind."""
    tokens = sum(n for n, _ in sizes)
    segment = sum(n * n for n, _ in sizes) / max(tokens, 1)  # of the example that a token is in
    found = per_token(config, length, segment=segment, targets=targets)
    kind = jax.devices()[0].device_kind
    peak = next((chip.tflops * 1e12 for chip in CHIPS.values() if chip.kind == kind), None)
    return Speed(found.model, peak and peak * devices)
