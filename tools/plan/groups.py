"""Which devices talk to each other: the group notations of HLO."""

from __future__ import annotations

import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def replica_groups(text: str, count: int) -> Groups:
    """The groups of a ``replica_groups`` attribute for ``count`` devices.

    ``{{0,1},{2,3}}`` lists them, ``{}`` is one group of all, and ``[2,4]<=[4,2]T(1,0)`` cuts the
    devices 0, 1, …, laid out as [4, 2] and transposed, into 2 groups of 4
    (https://openxla.org/xla/shardings, "iota tile assignment").
    """
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
