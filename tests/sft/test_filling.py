"""Rows planned for a whole run: full, and with every example whole in exactly one of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from sft.filling import fewest_rows, use
from sft.packing import plan_rows

# tokens of the episodes that SFT learns from in `remend quickstart`, seed 0; the most with loss: 72
QUICKSTART = """
    273 276 289 296 297 298 298 298 299 305 307 311 311 315 316 317 318 319 320 322 324 328
    337 338 339 340 341 342 343 346 349 350 351 355 358 362 363 366 368 369 373 379 380 381
    382 384 386 388 391 396 398 405 406 408 410 410 413 414 417 418 418 423 424 432 433 434
    438 441 453 458 465 465 467 468 476 478 490 493 495 511 512 513 515 517 538 541 570 573
    601 613 663
"""
EPISODES = [(int(n), 72) for n in QUICKSTART.split()]

sizes = st.lists(
    st.integers(2, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, min(n - 1, 30)))),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes)
def test_every_example_is_whole_in_one_row_that_holds_it(
    given_sizes: list[tuple[int, int]],
) -> None:
    plan = fewest_rows(given_sizes, 64, 30)
    assert sorted(i for row in plan for i in row) == list(range(len(given_sizes)))
    for row in plan:
        tokens, wanted = (
            sum(column) for column in zip(*(given_sizes[i] for i in row), strict=True)
        )
        assert row and tokens <= 64 and wanted <= 30
    assert len(plan) <= len(plan_rows(given_sizes, 64, 30))
    assert plan == fewest_rows(given_sizes, 64, 30)


@pytest.mark.parametrize("length", [1536, 2048, 4096])
def test_few_episodes_fill_their_rows(length: int) -> None:
    assert len(EPISODES) == 91
    plan = fewest_rows(EPISODES, length, 0)
    assert use(plan, EPISODES, length) >= 0.97
    assert use(plan_rows(EPISODES, length, 0), EPISODES, length) < 0.97  # best fit alone does not


def test_rows_of_two_episodes_stay_as_best_fit_has_them() -> None:
    """An episode of more than half a row goes with a shorter one or alone: no plan is shorter."""
    assert fewest_rows(EPISODES, 768, 448) == plan_rows(EPISODES, 768, 448)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("median", "spread", "length"), [(400, 0.6, 4096), (1500, 1.0, 8192)])
def test_long_tails_fill_their_rows(seed: int, median: int, spread: float, length: int) -> None:
    """Lengths of log-normal law, as those of episodes with tools are."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum(rng.lognormal(np.log(median), spread, 3000).astype(int) + 16, length)
    made = [(int(n), int(n) // 8) for n in drawn]
    for targets in (0, length // 4):
        assert use(fewest_rows(made, length, targets), made, length) >= 0.97


def test_targets_are_limited_too() -> None:
    made = [(10, 9)] * 7 + [(20, 1)] * 5
    for row in fewest_rows(made, 40, 10):
        assert sum(made[i][1] for i in row) <= 10 and sum(made[i][0] for i in row) <= 40


def test_what_fits_no_row_is_refused_and_nothing_makes_no_row() -> None:
    with pytest.raises(InputError, match="65 tokens"):
        fewest_rows([(65, 1)], 64, 0)
    assert fewest_rows([], 64, 0) == []
