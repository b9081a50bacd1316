"""Importance weights between server and learner."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.correction import correct
from rl.loss import LossConfig, policy_loss
from sft.packing import Example, Rows, pack


def rows_of(server: list[float], advantage: list[float]) -> Rows:
    n = len(server)
    example = Example(range(1, n + 2), [0.0] + [1.0] * n, [0.0, *server], [0.0, *advantage])
    return pack([example], 16, 12)


FLOATS = st.lists(st.floats(-5.0, -0.01), min_size=1, max_size=10)


@settings(deadline=None, max_examples=50)
@given(FLOATS, st.randoms(), st.floats(0.5, 4.0))
def test_the_objective_is_weighted_by_truncated_ratios(
    server: list[float], random: object, cap: float
) -> None:
    """The loss of the corrected rows is the sum over tokens of w · (clipped objective of
    π/π_learner), computed here token by token."""
    draw = random.uniform  # type: ignore[attr-defined]
    n = len(server)
    learner = [s + draw(-2, 2) for s in server]
    now = [x + draw(-0.5, 0.5) for x in learner]
    advantage = [draw(-2, 2) for _ in server]
    rows = rows_of(server, advantage)
    scored = np.zeros_like(rows.old_logprob)
    scored[0, :n] = learner
    (fixed,), values = correct([rows], lambda _: scored, cap)
    current = np.zeros_like(scored)
    current[0, :n] = now
    zero = np.zeros_like(scored)
    loss, _, _ = policy_loss(
        current, zero, fixed.weight, fixed.advantage, fixed.old_logprob, zero, LossConfig()
    )
    expected = 0.0
    for s, x, y, a in zip(server, learner, now, advantage, strict=True):
        ratio = np.exp(y - x)
        expected -= min(np.exp(x - s), cap) * min(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    assert float(loss) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    d = np.array(learner) - np.array(server)
    assert values["mismatch/kl"] == pytest.approx(np.mean(np.exp(d) - 1 - d), rel=1e-3, abs=1e-5)
    assert values["mismatch/max"] == pytest.approx(np.abs(d).max(), rel=1e-3, abs=1e-5)


def test_equal_policies_change_nothing() -> None:
    rows = rows_of([-1.0, -2.0], [0.5, -0.5])
    (fixed,), values = correct([rows], lambda r: r.old_logprob, 2.0)
    for one, other in zip(rows, fixed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(values.values()) == {0.0}


def test_padding_counts_for_nothing() -> None:
    rows = rows_of([-1.0], [1.0])
    empty = rows._replace(weight=np.zeros_like(rows.weight))
    _, values = correct([rows, empty], lambda r: np.full_like(r.old_logprob, -9.0), 2.0)
    assert values["mismatch/max"] == pytest.approx(8.0)
    _, values = correct([empty], lambda r: np.full_like(r.old_logprob, -9.0), 2.0)
    assert set(values.values()) == {0.0}
