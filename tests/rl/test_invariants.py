"""What must not matter does not: the order of a group, of groups and so of rows, packing, padding,
the number of microbatches. For every method, from episodes to loss and gradient.

The policy is a table of log-probabilities by token, so that its gradient is one array whatever the
rows look like. Meshes: ``tests/sft/on_meshes.py``.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.share import share_of
from rl.experience import AdvantageConfig, Scores, Shape, prepare
from rl.loss import LossConfig, loss_of_rows, value_loss
from sft.packing import Rows
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, Turn

VOCAB = 12
RNG = np.random.default_rng(4)
OLD, REFERENCE, VALUES, POLICY_TABLE = (
    (-RNG.exponential(1.0, VOCAB)).astype(np.float32) for _ in range(4)
)
GAE = AdvantageConfig("gae", whiten=True, gamma=0.97, lam=0.9)
METHODS = {
    "grpo": (AdvantageConfig(), LossConfig(aggregate="sequence", kl_coef=0.04)),
    "dr-grpo": (AdvantageConfig(), LossConfig(aggregate="constant", horizon=16)),
    "dapo": (
        AdvantageConfig(overlong_limit=9, overlong_buffer=4),
        LossConfig(clip_high=0.28, entropy_coef=0.01),
    ),
    "rloo": (AdvantageConfig("rloo"), LossConfig()),
    "gspo": (AdvantageConfig(), LossConfig(objective="gspo", aggregate="sequence")),
    "cispo": (AdvantageConfig(), LossConfig(objective="cispo", clip_low=1.0)),
    "ppo": (GAE, LossConfig()),
    "kl-in-reward": (GAE, LossConfig(kl_coef=0.05, kl_in="reward", kl_estimator="k1")),
}


def episodes() -> list[list[Trajectory]]:
    """Three groups of four: one to three turns, each behind what the environment wrote."""
    rng = np.random.default_rng(1)
    groups = []
    for _ in range(3):
        group = []
        for member in range(4):
            t = Trajectory("task", "p", "op", "train", "rl", 0, 0, "")
            for _ in range(rng.integers(1, 4)):
                t.add(rng.integers(0, VOCAB, rng.integers(1, 4)).tolist(), ENVIRONMENT)
                ids = rng.integers(0, VOCAB, rng.integers(1, 5)).tolist()
                t.add(ids, POLICY, [float(OLD[i]) for i in ids])
                t.turns.append(Turn("", [], []))
            t.reward = float(rng.integers(0, 3)) / 2 + 0.25 * (member == 0)
            group.append(t)
        groups.append(group)
    return groups


def of_token(table: np.ndarray, rows: Rows) -> np.ndarray:
    return np.where(rows.weight > 0, table[rows.target], 0.0).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def one(config: LossConfig, table: jax.Array, rows: Rows) -> tuple[jax.Array, ...]:
    """Loss of a microbatch, its divisor, and the gradients of both tables."""

    def objective(table: jax.Array, values: jax.Array):
        logprob = table[rows.target]
        entropy = jnp.exp(logprob) * rows.weight  # any function of the policy
        value = None if rows.returns is None else values[rows.target]
        found, sums = loss_of_rows(config)(logprob, entropy, rows, value)
        return found, sums.get("divisor", rows.weight.sum())

    both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, divisor), grads = both(table, jnp.asarray(VALUES))
    return loss, divisor, *grads


def update(method: str, groups: list[list[Trajectory]], shape: Shape) -> list[np.ndarray]:
    """The loss of one update and its gradients, as the learner adds and divides them."""
    advantage, config = METHODS[method]
    scores = Scores(
        reference=partial(of_token, REFERENCE) if config.kl_coef else None,
        value=partial(of_token, VALUES) if advantage.kind == "gae" else None,
    )
    batches, _ = prepare(
        groups,
        advantage,
        config,
        shape,
        share_of(None),
        scores,
        scale=method != "dr-grpo",
        credit=0.0,
        weight_cap=0.0,
    )
    parts = [one(config, jnp.asarray(POLICY_TABLE), rows) for rows in batches]
    loss, divisor, *grads = (sum(np.float64(p) for p in part) for part in zip(*parts, strict=True))
    return [found / divisor for found in (loss, *grads)]


def same(method: str, groups: list[list[Trajectory]], shape: Shape) -> None:
    for found, want in zip(update(method, groups, shape), WANT[method], strict=True):
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-6)


ALONE = Shape(24, 16, 12)  # one episode a row, one microbatch
WANT = {method: update(method, episodes(), ALONE) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 48, 12),  # several episodes a row, more padding behind and whole rows of it
        Shape(40, 0, 4),  # a slot for every token
        Shape(24, 16, 1),  # a microbatch for every row
    ],
    ids=["packed", "dense", "one-row"],
)
def test_packing_padding_and_microbatches(method: str, shape: Shape) -> None:
    same(method, episodes(), shape)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=3, deadline=None)
@given(random=st.randoms())
def test_order_of_groups_and_within_them(method: str, random) -> None:
    groups = episodes()
    for group in groups:
        random.shuffle(group)
    random.shuffle(groups)
    same(method, groups, Shape(48, 40, 3))


def test_what_does_matter() -> None:
    """The tests above could fail: an episode's reward and its length change the gradient."""
    for method in METHODS:
        groups = episodes()
        groups[0][0].reward += 1.0
        with pytest.raises(AssertionError):
            same(method, groups, ALONE)
        assert all(np.abs(found).max() > 1e-3 for found in WANT[method][:2])


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_value_gradient_by_finite_differences(clip: float) -> None:
    rng = np.random.default_rng(2)
    value, returns, old = rng.normal(0, 0.5, (3, 4, 5))
    weight = (rng.random((4, 5)) < 0.8) * rng.random((4, 5))

    def loss(v: np.ndarray) -> float:
        error = (v - returns) ** 2
        if clip:
            error = np.maximum(error, (np.clip(v, old - clip, old + clip) - returns) ** 2)
        return float(0.5 * (weight * error).sum())

    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in (weight, returns, old)]
        found, grad = jax.value_and_grad(lambda v: value_loss(v, *arrays, clip)[0])(
            jnp.asarray(value)
        )
    assert float(found) == pytest.approx(loss(value), rel=1e-12)
    for i in np.ndindex(value.shape):
        up, down = value.copy(), value.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        assert float(grad[i]) == pytest.approx((loss(up) - loss(down)) / 2e-6, abs=1e-7)
