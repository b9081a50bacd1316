"""A mesh's axes, and where its devices lie on the network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.plan.groups import Groups


@dataclass(frozen=True)
class Placement:
    """N devices in mesh order: the numbers that a compiled program's replica groups are made of.

    (With ``use_global_device_ids`` too: these ids are places in the program's device assignment,
    and JAX assigns devices in mesh order. They are not the ids that the devices print.)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ids: Sequence[int] = ()  # [N] as the devices print them; needed for several slices
    slices: Sequence[int] = ()  # [N] number of the device's slice; empty: there is one
    coords: Sequence[tuple[int, ...]] = ()  # [N] place on the torus, then on the chip

    @property
    def count(self) -> int:
        """N."""
        return math.prod(self.sizes)

    @functools.cached_property
    def across_slices(self) -> tuple[str, ...]:
        """Axes along which the slice changes."""
        if not self.slices:
            return ()
        found = set()
        for device in range(self.count):
            for name, index, stride in zip(
                self.names, self.place(device), self._strides, strict=True
            ):
                if index and self.slices[device] != self.slices[device - stride]:
                    found.add(name)
        return tuple(name for name in self.names if name in found)

    @property
    def _strides(self) -> list[int]:
        """How far apart neighbours along each axis are, in mesh order."""
        return [math.prod(self.sizes[axis + 1 :]) for axis in range(len(self.sizes))]

    def place(self, device: int) -> tuple[int, ...]:
        """The device's index along each axis."""
        out = []
        for size in reversed(self.sizes):
            device, index = divmod(device, size)
            out.append(index)
        return tuple(reversed(out))

    def number(self, at: Sequence[int]) -> int:
        """The device at an index along each axis."""
        return sum(i * stride for i, stride in zip(at, self._strides, strict=True))

    def of_locals(self, groups: Groups, partitions: int) -> Groups:
        """Groups of a program with ``partitions`` parts, as places in the mesh.

        The program for several slices is that of one of them, the same for all: its numbers count
        the devices of one slice, in mesh order. The first slice stands for all.
        """
        if partitions == self.count:
            return groups
        first = [i for i in range(self.count) if self.slices[i] == self.slices[0]]
        return tuple(tuple(first[i] for i in group) for group in groups)

    def of_ids(self, groups: Groups) -> Groups:
        """Groups of device ids, as places in the mesh."""
        where = {device: place for place, device in enumerate(self.ids)}
        return tuple(tuple(where[device] for device in group) for group in groups)

    def along(self, axes: Sequence[str]) -> int:
        """Devices along the axes."""
        return math.prod(self.sizes[self.names.index(axis)] for axis in axes)

    def axes(self, groups: Groups) -> tuple[str, ...]:
        """The axes along which members of a group differ, in mesh order.

        A group that holds only a part of an axis is given that axis: see its length.
        """
        found: set[str] = set()
        for group in groups:
            places = [self.place(device) for device in group]
            found.update(
                name
                for name, along in zip(self.names, zip(*places, strict=True), strict=True)
                if len(set(along)) > 1
            )
        return tuple(name for name in self.names if name in found)
