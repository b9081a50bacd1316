"""Rows for a whole run, planned once: where best fit leaves much room, by sums of lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft.packing import Plan, plan_rows

ENOUGH = 0.97  # of the rows' tokens used: no more is looked for
_LOOK = 256  # examples that one row is chosen from


def fewest_rows(sizes: Sequence[tuple[int, int]], length: int, targets: int) -> Plan:
    """As ``plan_rows``, but where rows hold few examples each, and best fit leaves much room, row
    by row the longest example left with those that fill the row best. Of both plans the shorter,
    best fit's if they are alike. Deterministic.

    Source: minimum bin slack with the largest item fixed (MBS'; Fleszar and Hindi, Computers &
    Operations Research 29, 2002), by a table of sums in place of a search.
    """
    plan = plan_rows(sizes, length, targets)
    if use(plan, sizes, length) >= ENOUGH:
        return plan
    filled: Plan = []
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i][0])
    while left:
        first, rest = left[0], left[1:]
        tokens, wanted = sizes[first]
        some = rest[:: -(-len(rest) // _LOOK)] if rest else []
        row = {first, *_best(sizes, some, length - tokens, (targets or length) - wanted)}
        filled.append([i for i in left if i in row])
        left = [i for i in left if i not in row]
    return filled if len(filled) < len(plan) else plan


def use(plan: Plan, sizes: Sequence[tuple[int, int]], length: int) -> float:
    """The share of the rows' tokens that examples take."""
    return sum(sizes[i][0] for row in plan for i in row) / max(len(plan) * length, 1)


def _best(
    sizes: Sequence[tuple[int, int]], some: Sequence[int], room: int, slots: int
) -> list[int]:
    """Of `some` examples those whose tokens come closest to `room` and whose targets fit `slots`.

    `last[n]`: the example that was the last to make a sum of n tokens possible, and once it is, no
    other takes its place: so each example is in a sum at most once.
    """
    last = np.full(room + 1, -1)
    taken = np.zeros(room + 1, np.int64)  # targets of that sum
    possible = np.arange(room + 1) == 0
    for i in some:
        tokens, wanted = sizes[i]
        if tokens > room:
            continue
        below = slice(0, room + 1 - tokens)
        fits = possible[below] & ~possible[tokens:] & (taken[below] + wanted <= slots)
        sums = np.flatnonzero(fits)
        last[sums + tokens], taken[sums + tokens] = i, taken[sums] + wanted
        possible[sums + tokens] = True
        if possible[room]:
            break
    at, chosen = int(np.flatnonzero(possible)[-1]), []
    while at:
        chosen.append(int(last[at]))
        at -= sizes[chosen[-1]][0]
    return chosen
