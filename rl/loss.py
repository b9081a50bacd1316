"""The policy-gradient losses and the value loss, as pure functions of arrays.

Notation: π the policy being trained, π_old the one at the start of the update (the server's
numbers, unless ``rl/correction.py`` tells the two apart), π_ref the reference, A the advantage,
ρ_t = π(y_t) / π_old(y_t), |y| the policy tokens of a sequence. All sums are over policy tokens;
``LossConfig.aggregate`` says how they become one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from configs.errors import InputError
from rl.sequences import sequence_sum, target_segments
from sft.learner import Loss
from sft.packing import Rows


@dataclass(frozen=True)
class LossConfig:
    """Attributes:
    objective: "clip" (PPO, GRPO, RLOO, DAPO), "gspo" or "cispo"; each a function below.
    clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]; equal in PPO, a larger
      `clip_high` is DAPO's clip-higher.
    aggregate: "token", the mean over all tokens of the batch (DAPO, Yu et al. 2025, arXiv
      2503.14476, eq. 8); "sequence", the mean over sequences of their mean over tokens (GRPO, Shao
      et al. 2024, arXiv 2402.03300, eq. 3); "constant", the sum over tokens / (sequences ·
      `horizon`) (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.2).
    horizon: tokens, for "constant" alone.
    kl_coef: weight of the KL penalty towards the reference policy (the SFT policy); 0 turns the
      reference off.
    kl_estimator, kl_in: which of `k1`, `k2`, `k3`, and whether it is part of the loss or taken from
      the reward (`rl/experience.py`).
    entropy_coef: weight of the entropy bonus.
    value_coef, value_clip: weight of the value loss where the critic shares the policy's network,
      and how far a value may move before its loss stops falling; 0 does not clip.
    """

    objective: Literal["clip", "gspo", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: Literal["token", "sequence", "constant"] = "token"
    horizon: int = 0
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: float = 0.0
    value_coef: float = 0.5
    value_clip: float = 0.2

    def __post_init__(self) -> None:
        if (self.aggregate == "constant") != (self.horizon > 0):
            raise InputError("rl.loss: horizon (tokens) goes with aggregate: constant, and only it")
        low = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        more = {"kl_coef": self.kl_coef}
        for name, value in {**low, **more, "value_clip": self.value_clip}.items():
            if value < 0:
                raise InputError(f"rl.loss: {name} must not be negative, got {value}")
        if self.kl_in == "loss" and self.kl_coef and self.kl_estimator == "k1":
            raise InputError(
                "rl.loss: k1 has a gradient of mean zero as a loss, it penalises nothing: set "
                "kl_in to reward, or kl_estimator to k2 or k3"
            )


# -- KL(π ‖ π_ref) per token, from a token that π sampled; d = log π - log π_ref. All three from
# Schulman 2020, http://joschu.net/blog/kl-approx.html.


def k1(logprob: jax.Array, other: jax.Array) -> jax.Array:
    """d: unbiased, of either sign."""
    return logprob - other


def k2(logprob: jax.Array, other: jax.Array) -> jax.Array:
    """d² / 2: biased, never negative; its gradient is that of the KL itself."""
    return 0.5 * (logprob - other) ** 2


def k3(logprob: jax.Array, other: jax.Array) -> jax.Array:
    """e^(-d) - 1 + d: unbiased, never negative."""
    log_r = other - logprob
    return jnp.exp(log_r) - 1.0 - log_r


KL = {"k1": k1, "k2": k2, "k3": k3}


# -- surrogates: what is maximised, per token


def clip_surrogate(
    log_ratio: jax.Array, advantage: jax.Array, logprob: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """min(ρ·A, clip(ρ, 1 - low, 1 + high)·A), and where the clip held it back.

    Schulman et al. 2017, PPO, arXiv 1707.06347, eq. 7.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    held = clipped * advantage < ratio * advantage
    return jnp.minimum(ratio * advantage, clipped * advantage), held


def cispo_surrogate(
    log_ratio: jax.Array, advantage: jax.Array, logprob: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """sg(clip(ρ, 1 - low, 1 + high))·A·log π, sg: stop-gradient: the weight is clipped, and no
    token loses its gradient. `low` = 1 leaves the lower side open, as in the paper.

    MiniMax 2025, MiniMax-M1, arXiv 2506.13585, eq. 4-5.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - low, 1.0 + high))
    return clipped * advantage * logprob, ratio != clipped


def sequence_log_ratio(
    log_ratio: jax.Array, used: jax.Array, segment: jax.Array, tokens: int
) -> jax.Array:
    """At every token, the log of GSPO's s = (π(y) / π_old(y))^(1/|y|): the mean of log ρ_t.

    Zheng et al. 2025, GSPO, arXiv 2507.18071, eq. 5-7: with it `clip_surrogate` is GSPO's, where
    the advantage is the same for the whole sequence and `aggregate` is "sequence".
    """
    length = sequence_sum(used.astype(log_ratio.dtype), segment, tokens)
    return sequence_sum(log_ratio, segment, tokens) / jnp.maximum(length, 1.0)


def policy_loss(
    logprob: jax.Array,
    entropy: jax.Array,
    weight: jax.Array,
    advantage: jax.Array,
    old_logprob: jax.Array,
    ref_logprob: jax.Array,
    config: LossConfig,
    *,
    segment: jax.Array | None = None,
    tokens: int = 0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The objective negated, as a sum; what to divide it by; and sums over tokens for the metrics.

    Per token: -surrogate + kl_coef·KL - entropy_coef·entropy. The divisor belongs to the whole
    batch, so the caller sums both over microbatches and devices first.

    Args:
      logprob, entropy: float32 [rows, targets], of the policy being trained.
      weight, advantage: float32 [rows, targets]; weight 0 marks an unused slot.
      old_logprob: float32 [rows, targets]: π_old.
      ref_logprob: float32 [rows, targets], of the reference policy; read if kl_coef > 0.
      segment, tokens: as in `rl.sequences.sequence_sum`; read where sequences matter.
    """
    used = weight > 0
    log_ratio = jnp.where(used, logprob - old_logprob, 0.0)
    rule, compared = clip_surrogate, log_ratio
    if config.objective == "cispo":
        rule = cispo_surrogate
    elif config.objective == "gspo":
        assert segment is not None
        compared = sequence_log_ratio(log_ratio, used, segment, tokens)
    surrogate, held = rule(compared, advantage, logprob, config.clip_low, config.clip_high)
    sums = {
        "rl/entropy": (weight * entropy).sum(),
        "rl/kl_old": (weight * k3(old_logprob, old_logprob + log_ratio)).sum(),
        "rl/clip_share": (weight * held).sum(),
        "mismatch/mean": (weight * jnp.abs(log_ratio)).sum(),
    }
    loss = -surrogate - config.entropy_coef * entropy
    if config.kl_coef:
        reference = jnp.where(used, ref_logprob, logprob)
        sums["rl/kl_ref"] = (weight * k3(logprob, reference)).sum()
        if config.kl_in == "loss":
            loss += config.kl_coef * KL[config.kl_estimator](logprob, reference)
    if config.aggregate == "token":
        return (weight * loss).sum(), weight.sum(), sums
    assert segment is not None
    length = jnp.maximum(sequence_sum(weight, segment, tokens), 1e-9)
    sequences = jnp.where(used, weight / length, 0.0)
    if config.aggregate == "sequence":
        return (sequences * loss).sum(), sequences.sum(), sums
    return (weight * loss).sum(), config.horizon * sequences.sum(), sums


def value_loss(
    value: jax.Array,
    weight: jax.Array,
    returns: jax.Array,
    old_value: jax.Array,
    clip: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of ½·max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²), and sums for the
    metrics; ε = 0 leaves ½·(V - R)².

    The clipping is of Schulman et al.'s PPO code; see Huang et al. 2022, "The 37 Implementation
    Details of Proximal Policy Optimization", detail 9. All float32 [rows, targets].
    """
    used = weight > 0
    value = jnp.where(used, value, 0.0)
    error = (value - returns) ** 2
    if clip:
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, (near - returns) ** 2)
    sums = {"rl/value": (weight * value).sum(), "rl/value_error": (weight * error).sum()}
    return 0.5 * (weight * error).sum(), sums


def loss_of_rows(config: LossConfig) -> Loss:
    """``policy_loss`` as the learner calls it; with ``value_loss`` where the policy has values, for
    which the mean must be over tokens (`rl.learning.RLConfig`)."""

    def loss(
        logprob: jax.Array, entropy: jax.Array, rows: Rows, value: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        whole = config.objective == "gspo" or config.aggregate != "token"
        found, divisor, sums = policy_loss(
            logprob,
            entropy,
            rows.weight,
            rows.advantage,
            rows.old_logprob,
            rows.ref_logprob,
            config,
            segment=target_segments(rows) if whole else None,
            tokens=rows.tokens.shape[1],
        )
        if value is not None:
            extra, more = value_loss(
                value, rows.weight, rows.returns, rows.old_value, config.value_clip
            )
            sums |= more
            found += config.value_coef * extra
        return found, sums if config.aggregate == "token" else sums | {"divisor": divisor}

    return loss


def critic_loss(config: LossConfig) -> Loss:
    """``value_loss`` as the learner of a critic with a network of its own calls it."""

    def loss(
        logprob: jax.Array, entropy: jax.Array, rows: Rows, value: jax.Array
    ) -> tuple[jax.Array, dict]:
        return value_loss(value, rows.weight, rows.returns, rows.old_value, config.value_clip)

    return loss
