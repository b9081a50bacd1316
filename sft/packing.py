"""Token sequences into fixed-shape rows, several to a row, with nothing lost and nothing mixed.

A row holds whole examples one behind the other; `segments` keeps attention inside each example and
`positions` restarts with each. The tokens that carry loss are listed by index, so that the
vocabulary projection is only ever computed where it is needed. Where rows are cut along the
sequence (`context`), or nearly every token is a target, there is a slot for each token instead.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.errors import InputError


@dataclass(frozen=True)
class Example:
    """One sequence. Per id: `weight` in the loss (0 for context), and for RL the log-probability
    it was sampled with and its advantage."""

    ids: Sequence[int]
    weight: Sequence[float]
    logprobs: Sequence[float] | None = None
    advantage: Sequence[float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(tokens, tokens with loss): what it takes of a row; nothing predicts the first."""
        return len(self.ids), sum(1 for w in self.weight[1:] if w)


class Rows(NamedTuple):
    """Packed rows; NumPy arrays on the host, JAX arrays inside a compiled step.

    tokens, segments, positions: int32 [rows, length]; segment 0 is padding.
    source: int32 [rows, targets]; index in the row of the token *before* each target. None: slot i
    is the target behind token i, and targets = length.
    target: int32 [rows, targets]; weight, advantage: float32 [rows, targets]; unused slots have
    weight 0. old_logprob, ref_logprob: float32 [rows, targets], when sampled and under the
    reference policy (0 where a run has none). returns, old_value: float32 [rows, targets] for a
    critic, else None.
    """

    tokens: Any
    segments: Any
    positions: Any
    source: Any
    target: Any
    weight: Any
    advantage: Any
    old_logprob: Any
    ref_logprob: Any
    returns: Any = None
    old_value: Any = None

    def select(self, rows: slice | np.ndarray) -> Rows:
        """Some of the rows, of every array."""
        return Rows(*(None if array is None else array[rows] for array in self))


Plan = list[list[int]]  # for each row, the examples in it


def pack(examples: Sequence[Example], length: int, targets: int) -> Rows:
    """Best-fit decreasing bin packing of `examples` into rows of `length` tokens, each with at most
    `targets` loss tokens; 0: a slot for every token. Deterministic; ties keep the given order.

    Raises:
      InputError: an example does not fit a row.
    """
    plan = plan_rows([example.size for example in examples], length, targets)
    return build(examples, plan, length, targets)


def plan_rows(sizes: Sequence[tuple[int, int]], length: int, targets: int) -> Plan:
    """The rows of ``pack`` by the numbers of their examples, of which no more than the sizes need
    be known; raises InputError as it does."""
    rows: Plan = []
    room: list[tuple[int, int, int]] = []  # (free tokens, row, free targets), sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
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


def build(examples: Sequence[Example], plan: Plan, length: int, targets: int) -> Rows:
    """The planned rows themselves."""
    rows = empty_rows(len(plan), length, targets)
    for row, members in enumerate(plan):
        _fill(rows, row, [examples[i] for i in members])
    return rows


def empty_rows(count: int, length: int, targets: int) -> Rows:
    """Rows of nothing but padding: what fills up a last, short batch."""
    shapes = [(count, length)] * 3 + [(count, targets or length)] * 6
    kinds = [np.int32] * 5 + [np.float32] * 4
    rows = Rows(*(np.zeros(s, k) for s, k in zip(shapes, kinds, strict=True)))
    return rows if targets else rows._replace(source=None)


def microbatches(rows: Rows, size: int) -> list[Rows]:
    """Cut rows into batches of exactly `size` rows, the last one filled up with padding.

    No rows at all give one batch of padding, whose gradient is zero.
    """
    count = len(rows.tokens)
    short = -count % size if count else size
    padding = jax.tree.map(lambda a: np.zeros((short, *a.shape[1:]), a.dtype), rows)
    whole = jax.tree.map(lambda *pair: np.concatenate(pair), rows, padding)
    return [whole.select(slice(start, start + size)) for start in range(0, count + short, size)]


def _fill(rows: Rows, row: int, examples: list[Example]) -> None:
    at = slot = 0
    for segment, example in enumerate(examples, 1):
        n = len(example.ids)
        rows.tokens[row, at : at + n] = example.ids
        rows.segments[row, at : at + n] = segment
        rows.positions[row, at : at + n] = np.arange(n)
        for i in range(1, n):  # nothing predicts the first token
            if not example.weight[i]:
                continue
            if rows.source is None:
                slot = at + i - 1
            else:
                rows.source[row, slot] = at + i - 1
            rows.target[row, slot] = example.ids[i]
            rows.weight[row, slot] = example.weight[i]
            if example.advantage is not None:
                rows.advantage[row, slot] = example.advantage[i]
            if example.logprobs is not None:
                rows.old_logprob[row, slot] = example.logprobs[i]
            slot += 1
        at += n
