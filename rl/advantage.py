"""Rewards into advantages: of a group of episodes, or token by token with a critic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_advantages(
    rewards: Sequence[float], *, scale: bool = True, eps: float = 1e-6
) -> list[float]:
    """GRPO's outcome advantage, (r_i - mean(r)) / (std(r) + eps), over one task's episodes.

    Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4.1.2; population standard deviation.
    Without `scale`, r_i - mean(r): small differences stay small (Liu et al. 2025, Dr. GRPO, arXiv
    2503.20783, section 3.2). A group whose rewards are all equal carries no signal: every advantage
    is 0.
    """
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    if not scale:
        return [r - mean for r in rewards]
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std + eps) for r in rewards]


def rloo_advantages(rewards: Sequence[float]) -> list[float]:
    """RLOO: each reward less the mean of the *others*, r_i - Σ_{j≠i} r_j / (n - 1).

    Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740, section 2.3 (Kool et al. 2019). A
    group of one has no others: 0.
    """
    n, whole = len(rewards), sum(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * n
    return [r - (whole - r) / (n - 1) for r in rewards]


def gae(
    rewards: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    gamma: float,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over the policy tokens of one episode, which then ends.

        δ_t = r_t + γ·V_{t+1} - V_t,  A_t = δ_t + γ·λ·A_{t+1},  R_t = A_t + V_t
        V_{T+1} = A_{T+1} = 0

    Schulman et al. 2016, arXiv 1506.02438, eq. 11-16. What the environment wrote between two turns
    is part of the state, not a step. Returns (advantages, returns), float64 [tokens].
    """
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    delta = r + gamma * np.append(v[1:], 0.0) - v
    advantages, after = np.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        after = advantages[t] = delta[t] + gamma * lam * after
    return advantages, advantages + v


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft penalty for length, to add to the reward: 0 up to limit - buffer, then falling
    evenly to -1 at the limit and beyond.

    Yu et al. 2025, arXiv 2503.14476, eq. 13. All in policy tokens.
    """
    if length <= limit - buffer:
        return 0.0
    return max((limit - buffer - length) / buffer, -1.0)
