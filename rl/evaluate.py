"""Success rates with honest intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sft.trajectory import Trajectory

RESAMPLES = 10_000


def per_task(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean success of each task over its episodes (pass@1 estimated from all tries)."""
    found: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.task, []).append(trajectory.success)
    return {task: sum(tries) / len(tries) for task, tries in sorted(found.items())}


def success(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean success over tasks, and its 95 % interval."""
    means = per_task(trajectories)
    return {**_interval(np.array(list(means.values()))), "episodes": len(trajectories)}


def paired_gain(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Mean over tasks of after - before, both measured on the same tasks, with its interval."""
    if before.keys() != after.keys():
        raise ValueError("a paired comparison needs the same tasks on both sides")
    return _interval(np.array([after[task] - before[task] for task in before]))


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % percentile bootstrap over tasks (Efron & Tibshirani 1993, ch. 13).

    Tasks are resampled, not episodes: tries of one task are not independent. The generator is
    seeded, so that the same results give the same interval.
    """
    rng = np.random.default_rng(0)
    draws = rng.choice(values, size=(RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "n": len(values),
    }
