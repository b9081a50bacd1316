"""A host's share of each batch: every host makes the same plan of all rows, from lengths alone, and
builds its own rows when their turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from model.share import Share
from sft.packing import Example, Plan, Rows, build, microbatches


def input_of(
    examples: Sequence[Example],
    plan: Plan,
    order: Sequence[np.ndarray],
    microbatch_rows: int,
    share: Share,
    length: int,
    targets: int,
) -> grain.MapDataset:
    """This host's microbatches of each update, as a Grain dataset: element i is what
    `share_of_batch` makes of the planned rows `order[i]`, and depends on nothing else. So the
    number of updates done is all that its place needs: a run goes on with ``dataset[done:]``.
    """

    def rows(numbers: np.ndarray) -> list[Rows]:
        wanted = [plan[row] for row in np.sort(numbers)]
        return share_of_batch(examples, wanted, microbatch_rows, share, length, targets)

    return grain.MapDataset.source(order).map(rows)


def ahead(dataset: grain.MapDataset, start: int) -> Any:
    """An iterator (to be closed) over the elements from `start` on, of which a thread makes the
    next while one is worked on."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset[start:].to_iter_dataset(options))


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
        batches += microbatches(build(examples, mine, length, targets), own)
    return batches


def even(batches: Sequence[Rows], count: int) -> list[Rows]:
    """`batches`, filled up with padding to `count` of them, the same on all hosts."""
    padding = jax.tree.map(np.zeros_like, batches[0])
    return [*batches, *[padding] * (count - len(batches))]
