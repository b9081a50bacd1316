"""Which tasks come next: those that are solved sometimes teach most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sandbox.task import Task
from sft.trajectory import Trajectory


class Curriculum:
    """Success counts by task, and draws weighted by them.

    With p = (s + 1/4) / (n + 1/2) after s successes in n episodes, a task weighs p·(1 - p) + floor:
    the variance of its reward, and so the size of a group's advantages (Florensa et al. 2018, arXiv
    1705.06366: tasks of intermediate difficulty). A task not yet tried weighs most; one that a
    group of eight always solved, or never, an eighth of that.
    """

    def __init__(self, tasks: Sequence[Task], floor: float = 0.005) -> None:
        self._tasks, self._floor = tasks, floor
        self._counts = {task.name: (0, 0) for task in tasks}

    def record(self, episodes: Iterable[tuple[str, bool]]) -> None:
        """Take note of episodes: name of the task, and whether it was solved."""
        for name, solved in episodes:
            if name in self._counts:
                s, n = self._counts[name]
                self._counts[name] = s + solved, n + 1

    def weights(self) -> np.ndarray:
        """float64 [tasks]."""
        counts = np.array([self._counts[task.name] for task in self._tasks], np.float64)
        p = (counts[:, 0] + 0.25) / (counts[:, 1] + 0.5)
        return p * (1 - p) + self._floor

    def choose(self, number: int, seed: Sequence[int]) -> list[Task]:
        """`number` different tasks, drawn by weight without replacement; a function of the counts
        and `seed`."""
        weights = self.weights()
        # exponential race (Efraimidis & Spirakis 2006)
        keys = np.random.default_rng(list(seed)).exponential(size=len(weights)) / weights
        return [self._tasks[i] for i in np.argsort(keys, kind="stable")[:number]]


def outcomes(episodes: Iterable[Trajectory]) -> list[tuple[str, bool]]:
    """What `Curriculum.record` takes."""
    return [(t.task, t.success) for t in episodes]
