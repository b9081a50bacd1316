"""Which devices talk to each other: the group notations of HLO."""

from __future__ import annotations

import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def replica_groups(text: str, count: int) -> Groups:
    """The groups of a ``replica_groups`` attribute for ``count`` devices.

    ``{{0,1},{2,3}}`` lists them, ``{}`` is one group of all, and ``[2,4]<=[4,2]T(1,0)`` cuts the
    devices 0, 1, …, laid out as [4, 2] and transposed, into 2 groups of 4
    (https://openxla.org/xla/shardings, "iota tile assignment"). ``mesh['x'=2,'y'=4] {'y'}`` is a
    group for each place along the axes that are not named; ``y:(2)2`` is the inner half of y, and
    ``, device_ids=([4,2]T(1,0))`` in between says which devices lie on that mesh, as above.
    """
    if text.startswith("mesh["):
        return _mesh_groups(text)
    iota = re.fullmatch(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        dims = _ints(iota[3])
        devices = np.arange(int(np.prod(dims))).reshape(dims)
        if iota[4]:
            devices = devices.transpose(_ints(iota[4]))
        groups = devices.reshape(int(iota[1]), int(iota[2])).tolist()
        return tuple(map(tuple, groups))
    if not re.fullmatch(r"\{(\{[\d,]*\},?)*\}", text):
        raise ValueError(f"replica_groups in a notation that is not known here: {text[:200]}")
    listed = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]*)\}", text[1:-1]))
    return listed or (tuple(range(count)),)


def _mesh_groups(text: str) -> Groups:
    """The groups of a mesh and some of its axes, or of parts of them."""
    found = re.fullmatch(
        r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    )
    axes = re.findall(r"'([^']+)'=(\d+)", found[1] if found else "")
    named = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", found[4] if found else "")
    sizes = {name: int(size) for name, size in axes}
    if not sizes or any(name not in sizes for name, _, _ in named):
        raise ValueError(f"replica_groups in a notation that is not known here: {text[:200]}")
    dims: list[int] = []
    inside: list[int] = []  # dimensions along which a group extends
    for name, size in sizes.items():
        cuts = {1, size}
        parts = [(int(pre or 1), int(part or size)) for n, pre, part in named if n == name]
        cuts.update(edge for pre, part in parts for edge in (pre, pre * part))
        edges = sorted(cuts)
        for low, high in zip(edges, edges[1:], strict=False):
            if any(pre <= low and high <= pre * part for pre, part in parts):
                inside.append(len(dims))
            dims.append(high // low)
    outside = [d for d in range(len(dims)) if d not in inside]
    devices = np.arange(int(np.prod(dims)))
    if found and found[2]:
        devices = devices.reshape(_ints(found[2]))
        devices = devices.transpose(_ints(found[3])) if found[3] else devices
    devices = devices.reshape(dims).transpose([*outside, *inside])
    length = int(np.prod([dims[d] for d in inside]))
    return tuple(map(tuple, devices.reshape(-1, length).tolist()))


def pairs(text: str) -> Groups:
    """The (from, to) pairs of ``source_target_pairs``, without those from a device to itself."""
    found = re.findall(r"\{(\d+),(\d+)\}", text)
    return tuple((int(a), int(b)) for a, b in found if a != b)


def megascale_target(text: str) -> Groups:
    """The groups of ids in a ``_xla_megascale_target``, in any of its three notations.

    ``{{100000,200000},{100001,200001}}`` lists them, ``"{1,2}x{0:7}"`` is device i of slices 1 and
    2, for i from 0 to 7, and ``{{100000->200000}}`` are pairs. A device's id is its slice's number,
    from one, times 100,000, plus its number in the slice.
    """
    text = text.strip('"')
    product = re.fullmatch(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", text)
    if product:
        slices, first, last = _ints(product[1]), int(product[2]), int(product[3])
        return tuple(tuple(s * 100_000 + i for s in slices) for i in range(first, last + 1))
    if "->" in text:
        return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+)->(\d+)", text))
    return tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", text[1:-1]))


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
