"""The loss and the advantages against independent float64 derivations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantage import group_advantages
from rl.loss import LossConfig, policy_loss

CONFIGS = [
    LossConfig(),
    LossConfig(clip_low=0.2, clip_high=0.28),
    LossConfig(kl_coef=0.1),
    LossConfig(entropy_coef=0.01),
]


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (3, 7)
    old = -rng.exponential(1.0, shape)
    return {
        "logprob": old + rng.normal(0, 0.3, shape),
        "entropy": rng.exponential(1.0, shape),
        "weight": rng.integers(0, 2, shape).astype(float),
        "advantage": rng.normal(0, 1, shape),
        "old_logprob": old,
        "ref_logprob": old + rng.normal(0, 0.3, shape),
    }


def reference(x: dict[str, np.ndarray], config: LossConfig) -> float:
    """Token by token in float64, straight from the equation in the docstring."""
    total = 0.0
    for i in np.ndindex(x["weight"].shape):
        if x["weight"][i] == 0:
            continue
        ratio = np.exp(x["logprob"][i] - x["old_logprob"][i])
        a = x["advantage"][i]
        bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        r = np.exp(x["ref_logprob"][i] - x["logprob"][i])
        penalty = config.kl_coef * (r - 1 - np.log(r))
        total += -min(ratio * a, bounded * a) + penalty - config.entropy_coef * x["entropy"][i]
    return total


def as_jax(x: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in x.items()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_float64_derivation(config: LossConfig, seed: int) -> None:
    x = draw(seed)
    value, _, _ = policy_loss(**as_jax(x), config=config)
    assert float(value) == pytest.approx(reference(x, config), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_by_finite_differences(config: LossConfig) -> None:
    x = draw(11)
    arrays = as_jax(x)

    def value(logprob: jax.Array) -> jax.Array:
        return policy_loss(**{**arrays, "logprob": logprob}, config=config)[0]

    found = np.asarray(jax.grad(value)(arrays["logprob"]))
    for i in np.ndindex(found.shape):
        up, down = dict(x), dict(x)
        step = np.zeros(found.shape)
        step[i] = 1e-5
        up["logprob"], down["logprob"] = x["logprob"] + step, x["logprob"] - step
        slope = (reference(up, config) - reference(down, config)) / 2e-5
        assert found[i] == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_on_policy_gradient_is_reinforce() -> None:
    """At ratio 1 the clip does nothing and the gradient is -A per token."""
    x = draw(3)
    x["logprob"] = x["old_logprob"]
    arrays = as_jax(x)
    grad = jax.grad(lambda lp: policy_loss(**{**arrays, "logprob": lp}, config=LossConfig())[0])(
        arrays["logprob"]
    )
    np.testing.assert_allclose(grad, -x["advantage"] * x["weight"], rtol=1e-5, atol=1e-6)


def test_unused_slots_are_inert_whatever_they_hold() -> None:
    x = draw(5)
    y = {name: value.copy() for name, value in x.items()}
    unused = x["weight"] == 0
    for name in ("logprob", "old_logprob", "ref_logprob"):
        y[name][unused] = -80.0
    config = LossConfig(kl_coef=0.1)
    first, _, _ = policy_loss(**as_jax(x), config=config)
    second, _, _ = policy_loss(**as_jax(y), config=config)
    assert float(first) == float(second)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=16), st.randoms())
def test_advantages_are_centred_scaled_and_follow_a_permutation(rewards, random) -> None:
    found = group_advantages(rewards)
    assert sum(found) == pytest.approx(0.0, abs=1e-6)
    if len(set(rewards)) == 1:
        assert found == [0.0] * len(rewards)
    else:
        assert np.mean(np.square(found)) == pytest.approx(1.0, rel=1e-4)
    centred = group_advantages(rewards, scale=False)
    assert np.std(rewards) * np.array(found) == pytest.approx(centred, abs=1e-4)
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = group_advantages([rewards[i] for i in order])
    assert shuffled == pytest.approx([found[i] for i in order])
