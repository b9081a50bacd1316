"""Success rates with honest intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rl.resample import crossed


class Judged(Protocol):
    """What is counted here: one episode of a task, whole (Trajectory) or as a report reads it."""

    @property
    def task(self) -> str: ...

    @property
    def success(self) -> bool: ...


def per_task(episodes: Sequence[Judged]) -> dict[str, float]:
    """Mean success of each task over its episodes (pass@1 estimated from all tries)."""
    found: dict[str, list[bool]] = {}
    for episode in episodes:
        found.setdefault(episode.task, []).append(episode.success)
    return {task: sum(tries) / len(tries) for task, tries in sorted(found.items())}


def breakdown(policies: Mapping[str, Sequence[Judged]], key: str) -> dict[str, dict[str, float]]:
    """Success over all episodes by the value of their attribute `key`, then by policy."""
    table: dict[str, dict[str, list[bool]]] = {}
    for policy, episodes in policies.items():
        for episode in episodes:
            row = table.setdefault(getattr(episode, key), {})
            row.setdefault(policy, []).append(episode.success)
    return {
        group: {policy: sum(won) / len(won) for policy, won in row.items()}
        for group, row in sorted(table.items())
    }


def success(trajectories: Sequence[Judged]) -> dict[str, float]:
    """Mean success over tasks, and its 95 % interval."""
    means = per_task(trajectories)
    return {**interval(np.array(list(means.values()))), "episodes": len(trajectories)}


def paired_gain(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Mean over tasks of after - before, both measured on the same tasks, with its interval."""
    if before.keys() != after.keys():
        raise ValueError("a paired comparison needs the same tasks on both sides")
    return interval(np.array([after[task] - before[task] for task in before]))


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % percentile bootstrap over tasks (Efron & Tibshirani 1993, ch. 13).

    Tasks are resampled, not episodes: tries of one task are not independent. The generator is
    seeded, so that the same results give the same interval.
    """
    found = crossed(values[np.newaxis])
    return {key: found[key] for key in ("mean", "low", "high", "n")}
