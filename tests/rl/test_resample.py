"""pass@k against counting every choice; intervals over tasks and seeds."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from rl.resample import crossed, pass_at_k, rate, rate_difference


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_of_k_tries_that_hold_a_success(n: int) -> None:
    for c in range(n + 1):
        tries = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            held = sum(any(choice) for choice in combinations(tries, k))
            assert pass_at_k(n, c, k) == pytest.approx(held / comb(n, k))


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 1), (2, 1, 3), (2, 1, 0), (2, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_equal_values_have_no_width_and_one_seed_widens_nothing() -> None:
    assert crossed(np.full((3, 20), 0.25)) == {
        "mean": 0.25, "low": 0.25, "high": 0.25, "n": 20, "seeds": 3,
    }  # fmt: skip
    tasks = np.random.default_rng(0).random((1, 50))
    one, same = crossed(tasks), crossed(np.repeat(tasks, 4, axis=0))
    for key in ("mean", "low", "high"):
        assert one[key] == pytest.approx(same[key])


def test_what_differs_between_seeds_widens_the_interval() -> None:
    tasks = np.random.default_rng(1).random((1, 60))
    apart = np.array([[-0.3], [0.0], [0.3]])
    narrow, wide = crossed(np.repeat(tasks, 3, axis=0)), crossed(tasks + apart)
    assert wide["mean"] == pytest.approx(narrow["mean"])
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_the_interval_of_seeds_and_tasks_covers_the_truth() -> None:
    """Effects of 5 seeds and 60 tasks about 0.3. It may cover more than 95 %, and with few seeds a
    little less: at least 0.9 less four standard errors of 40 draws."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(40):
        values = 0.3 + rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 0.3, (1, 60))
        found = crossed(values + rng.normal(0, 0.2, (5, 60)))
        covered += found["low"] <= 0.3 <= found["high"]
    assert covered >= 40 * (0.9 - 4 * 0.0474)


def test_rates_weigh_tasks_by_their_episodes_and_differences_are_paired() -> None:
    found = rate([1, 0, 8], [2, 2, 16])
    assert found["mean"] == pytest.approx(9 / 20) and found["n"] == 3
    hits, of = np.arange(30) % 5, np.full(30, 8)
    none = rate_difference((hits, of), (hits, of))
    assert none["mean"] == none["low"] == none["high"] == 0.0
    more = rate_difference((hits, of), (hits + 2, of))
    assert more["mean"] == pytest.approx(0.25)
    assert more["high"] - more["low"] < 1e-9  # each task rose by the same


def test_a_task_that_one_side_never_met_adds_nothing_to_it() -> None:
    found = rate_difference(([2, 0], [4, 0]), ([4, 1], [4, 4]))
    assert found["mean"] == pytest.approx(5 / 8 - 2 / 4)
