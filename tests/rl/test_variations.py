"""The variations of the loss against float64 derivations, and the advantages of RLOO and GAE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.advantage import gae, overlong_penalty, rloo_advantages
from rl.loss import LossConfig, policy_loss, value_loss

SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 3, 3, 3]])
VARIATIONS = {
    "grpo": LossConfig(aggregate="sequence", kl_coef=0.1),
    "dr-grpo": LossConfig(aggregate="constant", horizon=9),
    "dapo": LossConfig(clip_high=0.28),
    "gspo": LossConfig(objective="gspo", aggregate="sequence", clip_low=0.03, clip_high=0.04),
    "cispo": LossConfig(objective="cispo", clip_low=1.0, clip_high=0.1),
    "k2": LossConfig(kl_coef=0.3, kl_estimator="k2"),
}


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("logprob", "old_logprob", "ref_logprob")
    x = {name: -1 + rng.normal(0, 0.2, SEGMENT.shape) for name in names}
    x["entropy"] = rng.exponential(1.0, SEGMENT.shape)
    x["weight"] = ((rng.random(SEGMENT.shape) < 0.8) & (SEGMENT > 0)).astype(float)
    by_sequence = rng.normal(0, 1, (2, 4))
    x["advantage"] = np.take_along_axis(by_sequence, SEGMENT, 1)
    return x


def derived(x: dict[str, np.ndarray], c: LossConfig, frozen: np.ndarray) -> float:
    """Sequence by sequence and token by token. `frozen`: log π where CISPO stops the gradient."""
    sequences = []
    for row, n in sorted({(r, n) for r in range(2) for n in SEGMENT[r] if n}):
        at = [i for i in range(7) if SEGMENT[row, i] == n and x["weight"][row, i]]
        if not at:
            continue
        t = {k: v[row, at] for k, v in x.items()}
        rho = np.exp(t["logprob"] - t["old_logprob"])
        if c.objective == "gspo":
            rho = np.full(len(at), np.exp(np.mean(t["logprob"] - t["old_logprob"])))
        near = np.clip(rho, 1 - c.clip_low, 1 + c.clip_high)
        gain = np.minimum(rho * t["advantage"], near * t["advantage"])
        if c.objective == "cispo":
            held = np.exp(frozen[row, at] - t["old_logprob"])
            gain = np.clip(held, 1 - c.clip_low, 1 + c.clip_high) * t["advantage"] * t["logprob"]
        d = t["logprob"] - t["ref_logprob"]
        kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[c.kl_estimator]
        sequences.append(-gain + c.kl_coef * kl)
    if c.aggregate == "token":
        return float(np.mean(np.concatenate(sequences)))
    if c.aggregate == "sequence":
        return float(np.mean([s.mean() for s in sequences]))
    return float(sum(s.sum() for s in sequences) / len(sequences) / c.horizon)


def value(x: dict, c: LossConfig) -> jax.Array:
    found, divisor, _ = policy_loss(
        **{k: jnp.asarray(v) for k, v in x.items()},
        config=c,
        segment=jnp.asarray(SEGMENT),
        tokens=7,
    )
    return found / divisor


@pytest.mark.parametrize("name", VARIATIONS)
def test_value_and_gradient_equal_the_derivation(name: str) -> None:
    c = VARIATIONS[name]
    with jax.enable_x64(True):
        for seed in range(2):
            x = draw(seed)
            found, grad = jax.value_and_grad(lambda lp, x=x: value({**x, "logprob": lp}, c))(
                jnp.asarray(x["logprob"])
            )
            assert float(found) == pytest.approx(derived(x, c, x["logprob"]), rel=1e-6, abs=1e-9)
            for i in np.ndindex(SEGMENT.shape):
                up, down = (x["logprob"].copy() for _ in range(2))
                up[i] += 1e-6
                down[i] -= 1e-6
                ends = [derived({**x, "logprob": lp}, c, x["logprob"]) for lp in (up, down)]
                assert float(grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_rloo_compares_with_the_others() -> None:
    assert rloo_advantages([1.0, 0.0, 0.0]) == pytest.approx([1.0, -0.5, -0.5])
    assert rloo_advantages([1.0]) == [0.0]


def test_gae_is_the_discounted_sum_of_errors() -> None:
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=6), rng.normal(size=6)
    delta = r + 0.9 * np.append(v[1:], 0) - v
    want = [sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, 6)) for t in range(6)]
    advantages, returns = gae(r, v, 0.9, 0.8)
    np.testing.assert_allclose(advantages, want, rtol=1e-12)
    np.testing.assert_allclose(returns, advantages + v, rtol=1e-12)


def test_the_penalty_for_length_falls_evenly() -> None:
    assert [overlong_penalty(n, 10, 4) for n in (6, 8, 10, 20)] == [0.0, -0.5, -1.0, -1.0]


def test_a_clipped_value_takes_the_larger_error() -> None:
    one = [jnp.array([[x]]) for x in (1.0, 1.0, 2.0, 0.0)]
    assert float(value_loss(*one, 0.2)[0]) == pytest.approx(0.5 * (0.2 - 2.0) ** 2)
    assert float(value_loss(*one, 0.0)[0]) == pytest.approx(0.5)
