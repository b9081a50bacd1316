"""The hosts' shares of a batch are the batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs.errors import InputError
from model.share import Share
from sft.batches import ahead, even, input_of, share_of_batch
from sft.packing import Example, Rows, microbatches, pack, plan_rows

LENGTH = 48


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(1, 64, n).tolist(), (rng.random(n) < 0.6).astype(float).tolist())
        for n in rng.integers(4, LENGTH + 1, count)
    ]


def stack(parts: list[Rows]) -> Rows:
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_shares_of_a_batch_are_the_batch(rows: int, parts: int) -> None:
    data = examples(60)
    plan = plan_rows([e.size for e in data], LENGTH, LENGTH)[:rows]
    assert len(plan) == rows
    members = [data[i] for row in plan for i in row]
    order = plan_rows([e.size for e in members], LENGTH, LENGTH)
    want = microbatches(pack(members, LENGTH, LENGTH), 4)
    shares = [
        share_of_batch(members, order, 4, Share(part, parts), LENGTH, LENGTH)
        for part in range(parts)
    ]
    assert {len(share) for share in shares} == {len(want)}
    for i, batch in enumerate(want):
        found = stack([share[i] for share in shares])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(InputError, match="multiple of 3"):
        Share(0, 3).rows(8)


def test_hosts_with_fewer_batches_pass_padding() -> None:
    batches = microbatches(pack(examples(3), LENGTH, LENGTH), 2)
    filled = even(batches, len(batches) + 2)
    assert len(filled) == len(batches) + 2
    assert not filled[-1].weight.any() and filled[-1].tokens.shape == batches[0].tokens.shape


@pytest.mark.parametrize("part", [0, 1])
def test_the_input_of_a_run_is_the_same_from_wherever_it_goes_on(part: int) -> None:
    """By number, from any start, or from the state that Grain keeps of its place."""
    data, share = examples(60), Share(part, 2)
    plan = plan_rows([e.size for e in data], LENGTH, LENGTH)
    rng = np.random.default_rng(1)
    order = [rng.choice(len(plan), 7, replace=False) for _ in range(9)]
    dataset = input_of(data, plan, order, 4, share, LENGTH, LENGTH)
    rows = [[plan[row] for row in sorted(numbers)] for numbers in order]
    want = [share_of_batch(data, batch, 4, share, LENGTH, LENGTH) for batch in rows]
    assert len(dataset) == len(want)

    def same(found: list[list[Rows]], start: int) -> None:
        assert len(found) == len(want) - start
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want[start:]), strict=True):
            np.testing.assert_array_equal(a, b)

    same([dataset[i] for i in range(9)], 0)
    for start in (0, 1, 8, 9):
        batches = ahead(dataset, start)
        same(list(batches), start)
        batches.close()
    before = ahead(dataset, 2)
    next(before), next(before)
    state = before.get_state()
    next(before)
    after = ahead(dataset, 2)
    after.set_state(state)
    same(list(after), 4)


def test_what_goes_wrong_while_rows_are_made_ahead_is_raised() -> None:
    class Damaged(list):
        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            raise InputError("trajectories.jsonl:7: not a trajectory")

    data = examples(8)
    plan = plan_rows([e.size for e in data], LENGTH, LENGTH)
    dataset = input_of(Damaged(data), plan, [np.arange(2)] * 3, 2, Share(), LENGTH, LENGTH)
    with pytest.raises(InputError, match="jsonl:7"):
        next(ahead(dataset, 0))
