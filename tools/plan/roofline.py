"""How fast a step can be at best: its counts against the chip's figures.

Terms, each the time that one part of the machine needs if it never waits:

    compute    FLOPs / peak
    hbm        bytes / HBM bandwidth
    ici        collectives within a slice, one after the other
    dcn        collectives between slices, one after the other

The longest binds, and the step takes no less. Real steps take more: matrix units are not filled,
terms do not overlap wholly, every collective starts with a latency (about 1 µs a hop).

Bandwidth of a group of devices on the torus (https://jax-ml.github.io/scaling-book/sharding):

* For each torus dimension along which the group extends: two links (both ways round) where it
  covers a whole dimension that closes into a ring, else one: the device at an open end has no
  second.
* A group of every s-th device shares its links with s-1 others: 1/s.
* Dimensions add up, if the group fills a box; if not, it is given one link.

Gathers, scatters and reductions send at that rate. In an all-to-all each byte travels a quarter of
the ring on average (a line: over its middle link): operand * c / 4 over the bandwidth of the
dimension of c devices for which this is longest. A permute takes as long as its busiest link, each
message going along one dimension after the other, the shorter way round.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tools.plan.chips import GB, Chip, Slice
from tools.plan.groups import Groups
from tools.plan.hlo import Collective, Program
from tools.plan.placement import Placement


@dataclass(frozen=True)
class Roofline:
    """Seconds of each term, and what follows."""

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    axes_s: Mapping[str, float]  # ici and dcn by mesh axes, "fsdp+context" for both together
    mfu_ceiling: float  # the model's FLOPs over what the chip could do in the longest term

    @property
    def bound(self) -> str:
        """The term that binds."""
        return max(("compute", "hbm", "ici", "dcn"), key=self._of)

    @property
    def step_s(self) -> float:
        """No step is shorter."""
        return self._of(self.bound)

    def _of(self, term: str) -> float:
        return {
            "compute": self.compute_s,
            "hbm": self.hbm_s,
            "ici": self.ici_s,
            "dcn": self.dcn_s,
        }[term]


def roofline(program: Program, model_flops: float, place: Placement, on: Slice | Chip) -> Roofline:
    """The terms of a step.

    Args:
        program: counts of one device (``tools.plan.hlo.analyse`` with the same placement).
        model_flops: what the model's step needs on one device, recomputation left out
            (``tools.plan.flops``).
        on: the slice, or for GPUs the chip: its hosts are then taken as fully connected.
    """
    chip = on.chip if isinstance(on, Slice) else on
    ici = dcn = 0.0
    axes: dict[str, float] = {}
    for row in program.collectives:
        seconds = collective_s(row, place, on)
        name = "+".join(row.axes)
        axes[name] = axes.get(name, 0.0) + seconds
        if row.dcn:
            dcn += seconds
        else:
            ici += seconds
    compute = program.flops / (chip.tflops * 1e12)
    hbm = program.hbm_bytes / (chip.hbm_gbs * GB)
    longest = max(compute, hbm, ici, dcn)
    peak = longest * chip.tflops * 1e12
    return Roofline(compute, hbm, ici, dcn, axes, model_flops / peak if peak else 0.0)


def collective_s(row: Collective, place: Placement, on: Slice | Chip) -> float:
    """Seconds of all executions of a collective."""
    chip = on.chip if isinstance(on, Slice) else on
    if not row.sent:
        return 0.0
    if row.dcn:  # all devices of a host send at once
        return row.sent * chip.per_host / (chip.dcn_gbs * GB)
    if not isinstance(on, Slice):
        return row.sent / (chip.ici_gbs * GB)
    if row.kind == "collective-permute":
        return row.sent * _busiest(row.groups, place, on) / (chip.ici_gbs * GB)
    links = Links.of(row.groups[0], place, on)
    if row.kind in ("all-to-all", "ragged-all-to-all"):
        return row.bytes * links.farthest / (4 * chip.ici_gbs * GB)
    return row.sent / (links.total * chip.ici_gbs * GB)


@dataclass(frozen=True)
class Links:
    """What a group of devices has of the torus, in links of one direction."""

    total: float
    farthest: float  # largest (devices along a dimension) / (its links)

    @classmethod
    def of(cls, group: Iterable[int], place: Placement, on: Slice) -> Links:
        """The links of a group of places in the mesh."""
        coords = [place.coords[device] for device in group]
        along = [sorted(set(values)) for values in zip(*coords, strict=True)]
        extents = [len(values) for values in along]
        if math.prod(extents) != len(coords) or not all(map(_even, along)):
            return cls(1.0, float(len(coords)))
        links = {}
        for dim, values in enumerate(along):
            if len(values) == 1:
                continue
            stride = values[1] - values[0]
            ring = dim < len(on.shape) and (on.wraps(dim) and len(values) * stride == on.shape[dim])
            links[dim] = (2 if ring else 1) / stride
        return cls(sum(links.values()), max(extents[dim] / links[dim] for dim in links))


def _busiest(pairs: Groups, place: Placement, on: Slice) -> int:
    """Most messages that go over one link in one direction."""
    load: Counter[tuple[tuple[int, ...], int, int]] = Counter()
    for source, target in pairs:
        at, goal = list(place.coords[source]), place.coords[target]
        for dim in range(len(at)):
            size = on.shape[dim] if dim < len(on.shape) else 0
            ahead = goal[dim] - at[dim]
            if size and on.wraps(dim) and abs(ahead) > size / 2:
                ahead -= int(math.copysign(size, ahead))
            step = 1 if ahead > 0 else -1
            for _ in range(abs(ahead)):
                load[tuple(at), dim, step] += 1
                at[dim] += step
                if size:
                    at[dim] %= size
    return max(load.values(), default=0)


def _even(values: list[int]) -> bool:
    """Whether neighbours are all equally far apart."""
    return len({b - a for a, b in zip(values, values[1:], strict=False)}) <= 1
