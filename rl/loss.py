"""The policy-gradient loss, per token, as a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sft.learner import Loss
from sft.packing import Rows


@dataclass(frozen=True)
class LossConfig:
    """Attributes:
    clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]; equal in PPO, a larger
      `clip_high` is DAPO's clip-higher.
    kl_coef: weight of the KL penalty towards the reference policy (the SFT policy); 0 turns the
      reference off.
    entropy_coef: weight of the entropy bonus.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


def k3(logprob: jax.Array, other: jax.Array) -> jax.Array:
    """Schulman's k3 estimate, per token, of KL(sampling ‖ other): r - 1 - log r ≥ 0 with
    r = other / sampling. http://joschu.net/blog/kl-approx.html"""
    log_r = other - logprob
    return jnp.exp(log_r) - 1.0 - log_r


def grpo_loss(
    logprob: jax.Array,
    entropy: jax.Array,
    weight: jax.Array,
    advantage: jax.Array,
    old_logprob: jax.Array,
    ref_logprob: jax.Array,
    config: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of the GRPO objective, negated, and sums over tokens for the metrics.

    Per token, with ratio ρ = exp(logprob - old_logprob):
      -min(ρ·A, clip(ρ, 1 - low, 1 + high)·A) + kl_coef·k3(logprob, ref) - entropy_coef·entropy
    (Schulman et al. 2017, arXiv 1707.06347, eq. 7; Shao et al. 2024, arXiv 2402.03300, eq. 3-4).
    The caller divides by the policy tokens of the whole batch (token-level loss, Yu et al. 2025,
    DAPO, arXiv 2503.14476, eq. 8).

    Args:
      logprob, entropy: float32 [rows, targets], of the policy being trained.
      weight, advantage: float32 [rows, targets]; weight 0 marks an unused slot.
      old_logprob: float32 [rows, targets], recorded when the token was sampled.
      ref_logprob: float32 [rows, targets], of the reference policy; read if kl_coef > 0.
    """
    used = weight > 0
    log_ratio = jnp.where(used, logprob - old_logprob, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    loss = -surrogate - config.entropy_coef * entropy
    if config.kl_coef:
        loss += config.kl_coef * k3(logprob, jnp.where(used, ref_logprob, logprob))
    sums = {
        "rl/entropy": (weight * entropy).sum(),
        "rl/kl_old": (weight * k3(old_logprob, old_logprob + log_ratio)).sum(),
        "rl/clip_share": (weight * (clipped * advantage < ratio * advantage)).sum(),
        "mismatch/mean": (weight * jnp.abs(log_ratio)).sum(),
    }
    return (weight * loss).sum(), sums


def loss_of_rows(config: LossConfig) -> Loss:
    """``grpo_loss`` as the learner calls it."""

    def loss(logprob: jax.Array, entropy: jax.Array, rows: Rows) -> tuple[jax.Array, dict]:
        return grpo_loss(
            logprob,
            entropy,
            rows.weight,
            rows.advantage,
            rows.old_logprob,
            rows.ref_logprob,
            config,
        )

    return loss
