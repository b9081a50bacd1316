"""The one table of accelerators, and the names of TPU slices.

Sources of the figures:

* TPU: the "System architecture" tables of https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}
  and .../tpu7x: peak compute, HBM bandwidth, torus dimensions, chips per host, DCN.
* ICI: https://jax-ml.github.io/scaling-book/tpus ("ICI BW/link, one-way"), which is 0.9 of what the
  tables above give per chip, divided by links and directions. Ironwood is not in the book: 0.9 of
  its table's 1,200 GB/s over six links and two directions.
* HBM that a program can have: what XLA:TPU (libtpu 0.0.52) says when one needs more.
* GPU: the NVIDIA H100 (SXM) and H200 data sheets, dense; the memory that nvidia-smi shows; eight
  GPUs and eight 400 Gb/s adapters a host, as in DGX H100/H200.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from configs.errors import InputError

GB = 1e9


@dataclass(frozen=True)
class Chip:
    """Figures of one JAX device: a chip, except on v7x, where it is half of one.

    ``ici_gbs`` is one link in one direction; a chip has two links for each dimension of its torus.
    With ``torus`` 0 the devices of a host hang on a switch and ``ici_gbs`` is a device's way into
    it. Where two devices share a chip's links, each is given half.
    """

    name: str
    kind: str  # as jax.Device.device_kind has it
    tflops: float  # bf16, peak
    hbm_gib: float  # that a program can have
    hbm_gbs: float
    torus: int  # dimensions
    ici_gbs: float
    dcn_gbs: float  # of a host, one way
    per_host: int  # devices that share it
    full: int  # a torus dimension closes into a ring at this size (v5e, v6e) or its multiples
    per_chip: int = 1  # JAX devices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275, 30.75, 1200, 3, 45, 25, 4, 4),
        Chip("v5e", "TPU v5 lite", 197, 15.75, 819, 2, 45, 25, 8, 16),
        Chip("v5p", "TPU v5", 459, 95.73, 2765, 3, 90, 25, 4, 4),
        Chip("v6e", "TPU v6 lite", 918, 31.24, 1638, 2, 90, 100, 8, 16),
        Chip("v7x", "TPU7x", 1153.5, 94.74, 3690, 3, 45, 50, 8, 4, per_chip=2),
        Chip("h100", "NVIDIA H100 80GB HBM3", 989.4, 79.6, 3350, 0, 450, 400, 8, 0),
        Chip("h200", "NVIDIA H200", 989.4, 140.4, 4800, 0, 450, 400, 8, 0),
    )
}

# Cloud accelerator types: the number counts TensorCores on v4, v5p and v7x (two a chip), chips on
# v5e and v6e. Shapes as in the "Configurations" tables of the pages above.
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}
_FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "tpu7x": "v7x",
    "ironwood": "v7x",
}


@dataclass(frozen=True)
class Slice:
    """``slices`` equal boxes of chips, joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each torus dimension
    slices: int = 1

    @property
    def name(self) -> str:
        """The canonical spelling, e.g. ``2xv6e:16x16``."""
        shape = "x".join(map(str, self.shape))
        return f"{self.slices}x" * (self.slices > 1) + f"{self.chip.name}:{shape}"

    @property
    def devices(self) -> int:
        """JAX devices in all slices."""
        return self.slices * math.prod(self.shape) * self.chip.per_chip

    def wraps(self, dim: int) -> bool:
        """Whether torus dimension ``dim`` closes into a ring.

        v5e and v6e: where it has all 16 chips. v4, v5p, v7x: the optical switches close every
        dimension of slices made of whole 4x4x4 cubes (scaling book, "TPU networking").
        """
        if self.chip.torus == 2:
            return self.shape[dim] == self.chip.full
        return all(size % self.chip.full == 0 for size in self.shape)


def parse(name: str) -> Slice:
    """A slice from ``v5p:4x4x4``, a cloud name like ``v5p-128``, or several: ``2xv6e-256``.

    Raises InputError for anything else, naming the nearest slice there is.
    """
    text = name.strip().lower()
    match = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?([a-z][a-z0-9]*)(?:-(\d+)|:(\d+(?:x\d+)*))", text)
    if not match:
        raise InputError(_unknown(name, text))
    count, family, size, shape = match.groups(default="")
    chip = CHIPS.get(_ALIASES.get(family, family))
    if chip is None or not chip.torus:
        raise InputError(_unknown(name, text))
    if size:
        cores = 2 if chip.torus == 3 else 1
        table = _CUBES if chip.torus == 3 else _FLAT
        if int(size) % cores or int(size) // cores not in table:
            raise InputError(_unknown(name, text))
        shape = table[int(size) // cores]
    dims = tuple(map(int, shape.split("x")))
    slices = int(count or 1)
    if len(dims) != chip.torus or 0 in dims or not slices:
        raise InputError(_unknown(name, text))
    if chip.torus == 2 and max(dims) > chip.full:
        raise InputError(f"topology {name!r}: a {chip.name} pod has {chip.full}x{chip.full} chips")
    return Slice(chip, dims, slices)


def _unknown(name: str, text: str) -> str:
    """The message for a name that is no slice: the nearest family, and its nearest size."""
    family, mark, size = re.findall(r"^(?:\d+x(?=[a-z]))?([^:-]*)([:-]?)(.*)$", text)[0]
    tpus = [chip.name for chip in CHIPS.values() if chip.torus]
    nearest: str = difflib.get_close_matches(family, [*tpus, *_ALIASES], n=1, cutoff=0.0)[0]
    chip = CHIPS[_ALIASES.get(nearest, nearest)]
    table, cores = (_CUBES, 2) if chip.torus == 3 else (_FLAT, 1)
    wanted = math.prod(map(int, re.findall(r"\d+", size)))
    if mark == "-":
        near = f"{chip.name}-{cores * min(table, key=lambda n: abs(n * cores - wanted))}"
    else:
        near = f"{chip.name}:{table[min(table, key=lambda n: abs(n - wanted))]}"
    return (
        f"topology {name!r} is unknown: did you mean {near}? (CHIP:SHAPE, CHIP-SIZE, 2xCHIP-SIZE)"
    )
