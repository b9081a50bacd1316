"""Intervals for a study: tasks and training seeds are both a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import numpy as np

RESAMPLES = 4_000

Counts = Sequence[float] | np.ndarray


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k tries succeeds, from n tries of which c did: unbiased.

        1 - C(n - c, k) / C(n, k)

    Chen et al. 2021, arXiv 2107.03374, eq. 1. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} in {n} tries")
    return 1.0 - comb(n - c, k) / comb(n, k)


def crossed(values: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Mean and percentile interval of values float [seeds, tasks].

    The pigeonhole bootstrap (Owen 2007, arXiv 0712.1111): tasks and seeds are each drawn with
    replacement, and a draw is the mean over the drawn rows and columns. What varies from task to
    task and what varies from one training to the next both widen the interval; with one seed it is
    that of the tasks alone. Differences between two policies go in as differences on the same task
    and seed, so that the interval is a paired one. The generator is seeded.

    Returns mean, low, high, n (tasks) and seeds.
    """
    seeds, tasks = values.shape
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=RESAMPLES) / tasks
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    draws = np.einsum("bs,st,bt->b", rows, values, drawn, optimize=True)
    return _interval(float(values.mean()), draws, level) | {"n": tasks, "seeds": seeds}


def over_tasks(
    statistic: Callable[[np.ndarray], np.ndarray], tasks: int, level: float = 0.95
) -> dict[str, float]:
    """Percentile interval of a statistic of task weights: float [draws, tasks] -> [draws].

    For rates of what does not come evenly, such as episodes of a long run: a task's episodes are
    drawn together. Draws without a value (nan) are left out.
    """
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=RESAMPLES).astype(float)
    whole = float(statistic(np.ones((1, tasks)))[0])
    draws = statistic(drawn)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        raise ValueError("no draw of the tasks has a value")
    return _interval(whole, draws, level) | {"n": tasks}


def rate(hits: Counts, of: Counts, level: float = 0.95) -> dict[str, float]:
    """The rate sum(hits) / sum(of) over tasks, each with its own counts, with its interval."""
    h, n = np.asarray(hits, float), np.asarray(of, float)
    return over_tasks(lambda w: _share(w, h, n), len(h), level)


def rate_difference(
    first: tuple[Counts, Counts],
    second: tuple[Counts, Counts],
    level: float = 0.95,
) -> dict[str, float]:
    """Rate of `second` less that of `first`, each (hits, of) over the same tasks, paired."""
    a, b = (tuple(np.asarray(x, float) for x in side) for side in (first, second))
    return over_tasks(lambda w: _share(w, *b) - _share(w, *a), len(a[0]), level)


def _share(weights: np.ndarray, hits: np.ndarray, of: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ hits) / (weights @ of)


def _interval(mean: float, draws: np.ndarray, level: float) -> dict[str, float]:
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, [tail, 100 - tail])
    # sums in another order differ by a rounding, which must not put an edge across a line
    found = {"mean": mean, "low": float(low), "high": float(high)}
    return {key: round(value, 12) + 0.0 for key, value in found.items()}
