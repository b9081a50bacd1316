"""Which examples go into which row, from their lengths alone, and then only the rows one needs.

Every host makes the same plan and builds its own share of each batch, when its turn comes: no host
ever holds all rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import jax
import numpy as np

from configs.errors import InputError
from model.share import Share
from sft.packing import Example, Rows, empty_rows, microbatches, pack

Plan = list[list[int]]  # for each row, the examples in it


def plan_rows(examples: Sequence[Example], length: int, targets: int) -> Plan:
    """The rows of ``pack`` by the numbers of their examples; raises InputError as it does."""
    rows: Plan = []
    room: list[tuple[int, int, int]] = []  # (free tokens, row, free targets), sorted
    sizes = [(len(e.ids), sum(1 for w in e.weight[1:] if w)) for e in examples]
    for i in sorted(range(len(examples)), key=lambda i: -sizes[i][0]):
        tokens, wanted = sizes[i]
        if tokens > length or wanted > (targets or length):
            raise InputError(
                f"example {i} has {tokens} tokens, {wanted} with loss; a row holds {length}, "
                f"{targets}: raise row_tokens or row_targets"
            )
        at = bisect.bisect_left(room, (tokens, -1, -1))
        at = next((k for k in range(at, len(room)) if room[k][2] >= wanted), len(room))
        if at < len(room):
            free, row, slots = room.pop(at)
        else:
            free, row, slots = length, len(rows), targets or length
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (free - tokens, row, slots - wanted))
    return rows


def share_of_batch(
    examples: Sequence[Example],
    rows: Plan,
    microbatch_rows: int,
    share: Share,
    length: int,
    targets: int,
) -> list[Rows]:
    """This host's part of each microbatch of a batch of planned rows, padded to one shape.

    Row i of a microbatch belongs to part i // (microbatch_rows / parts).
    """
    own = share.rows(microbatch_rows)
    batches = []
    for start in range(0, max(len(rows), 1), microbatch_rows):
        first = start + share.part * own
        mine = rows[first : min(first + own, start + microbatch_rows)]
        batches += microbatches(_build(examples, mine, length, targets), own)
    return batches


def _build(examples: Sequence[Example], rows: Plan, length: int, targets: int) -> Rows:
    built = [pack([examples[i] for i in members], length, targets) for members in rows]
    if not built:
        return empty_rows(0, length, targets)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *built)


def even(batches: Sequence[Rows], count: int) -> list[Rows]:
    """`batches`, filled up with padding to `count` of them, the same on all hosts."""
    padding = jax.tree.map(np.zeros_like, batches[0])
    return [*batches, *[padding] * (count - len(batches))]
