"""Rewards of a group of episodes into advantages."""

from __future__ import annotations

from collections.abc import Sequence


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
