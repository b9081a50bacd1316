"""Packing loses no token, mixes no example, and lists exactly the tokens that carry loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from sft.packing import Example, microbatches, pack

LENGTH, TARGETS = 32, 20

examples = st.lists(
    st.integers(2, LENGTH).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(1, 99), min_size=n, max_size=n),
            st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.5]), min_size=n, max_size=n),
            st.sampled_from([-0.5, 0.0, 0.25]),
        )
    ),
    max_size=12,
).map(
    lambda rows: [
        Example(ids, weight, [-0.25 * i for i in ids], [advantage * i for i in ids])
        for ids, weight, advantage in rows
        if sum(w > 0 for w in weight[1:]) <= TARGETS
    ]
)


@given(examples)
def test_every_example_comes_back_from_its_row(given_examples: list[Example]) -> None:
    rows = pack(given_examples, LENGTH, TARGETS)
    found = []
    for tokens, segments, positions in zip(rows.tokens, rows.segments, rows.positions, strict=True):
        for segment in range(1, segments.max() + 1):
            members = np.flatnonzero(segments == segment)
            assert (np.diff(members) == 1).all()
            assert positions[members].tolist() == list(range(len(members)))
            found.append(tokens[members].tolist())
    assert sorted(found) == sorted(list(e.ids) for e in given_examples)


@given(examples)
def test_targets_follow_their_source_inside_one_segment(given_examples: list[Example]) -> None:
    rows = pack(given_examples, LENGTH, TARGETS)
    total = 0.0
    for r, s in zip(*np.nonzero(rows.weight), strict=True):
        at = rows.source[r, s]
        assert rows.tokens[r, at + 1] == rows.target[r, s]
        assert rows.segments[r, at] == rows.segments[r, at + 1] > 0
        assert rows.old_logprob[r, s] == np.float32(-0.25 * rows.target[r, s])
        assert rows.advantage[r, s] in {c * rows.target[r, s] for c in (-0.5, 0.0, 0.25)}
        total += rows.weight[r, s]
    assert total == pytest.approx(sum(sum(e.weight[1:]) for e in given_examples))


@given(examples, st.integers(1, 5))
def test_microbatches_have_one_shape_and_the_same_loss_tokens(
    given_examples: list[Example], size: int
) -> None:
    rows = pack(given_examples, LENGTH, TARGETS)
    batches = microbatches(rows, size)
    assert batches and all(b.tokens.shape == (size, LENGTH) for b in batches)
    assert sum(b.weight.sum() for b in batches) == rows.weight.sum()


def test_an_example_that_fits_no_row_is_refused() -> None:
    with pytest.raises(InputError, match="33 tokens"):
        pack([Example([1] * 33, [0.0] * 33)], LENGTH, TARGETS)
    with pytest.raises(InputError, match="row_targets"):
        pack([Example([1] * 30, [1.0] * 30)], LENGTH, TARGETS)
