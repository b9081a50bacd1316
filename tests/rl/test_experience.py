"""From rewards to what the learner gets, where numbers for every token come in between."""

from __future__ import annotations

import numpy as np
import pytest

from model.share import share_of
from rl.experience import AdvantageConfig, Scores, Shape, prepare
from rl.loss import LossConfig
from sft.packing import Rows
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, Turn

REWARDS = (1.0, 0.0, 0.25)
TOKENS = (3, 2, 4)
COEF, GAP = 0.1, 0.5  # the reference's log-probabilities are lower by as much


def group() -> list[Trajectory]:
    found = []
    for reward, count in zip(REWARDS, TOKENS, strict=True):
        t = Trajectory("task", "p", "op", "train", "rl", 0, 0, "")
        t.add([1, 2], ENVIRONMENT)
        t.add(list(range(3, 3 + count)), POLICY, [-1.0] * count)
        t.turns.append(Turn("", [], []))
        t.reward = reward
        found.append(t)
    return found


def prepared(advantage: AdvantageConfig, loss: LossConfig) -> Rows:
    scores = Scores(
        reference=lambda rows: rows.old_logprob - np.float32(GAP) * (rows.weight > 0),
        value=(lambda rows: np.zeros_like(rows.weight)) if advantage.kind == "gae" else None,
    )
    (rows,), _ = prepare(
        [group()],
        advantage,
        loss,
        Shape(8, 6, 4),
        share_of(None),
        scores,
        scale=False,
        credit=0.0,
        weight_cap=0.0,
    )
    return rows


def by_episode(rows: Rows, array: np.ndarray) -> list[list[float]]:
    """Used slots, row by row, the longest episode first: each has a row of its own here."""
    return [array[i][rows.weight[i] > 0].tolist() for i in range(3)]


LOSS = LossConfig(kl_coef=COEF, kl_in="reward", kl_estimator="k1")
ORDER = sorted(range(3), key=lambda i: -TOKENS[i])


def test_a_group_is_compared_by_reward_less_kl() -> None:
    whole = [r - COEF * GAP * n for r, n in zip(REWARDS, TOKENS, strict=True)]
    rows = prepared(AdvantageConfig(), LOSS)
    for found, i in zip(by_episode(rows, rows.advantage), ORDER, strict=True):
        assert found == pytest.approx([whole[i] - np.mean(whole)] * TOKENS[i], abs=1e-6)


def test_returns_are_what_is_still_to_come() -> None:
    rows = prepared(AdvantageConfig("gae", lam=1.0), LOSS)
    for found, i in zip(by_episode(rows, rows.returns), ORDER, strict=True):
        left = [REWARDS[i] - COEF * GAP * (TOKENS[i] - t) for t in range(TOKENS[i])]
        assert found == pytest.approx(left, abs=1e-6)


def test_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    rows = prepared(AdvantageConfig("gae", whiten=True, lam=1.0), LOSS)
    used = rows.advantage[rows.weight > 0]
    assert used.mean() == pytest.approx(0.0, abs=1e-6)
    assert used.std() == pytest.approx(1.0, abs=1e-5)
    assert not rows.advantage[rows.weight == 0].any()
