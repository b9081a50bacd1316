"""Each claim is decided by its rule alone: on one side, on the other, and in between."""

from __future__ import annotations

import itertools

import pytest

from rl import claims
from rl.claims import CLAIMS, LEAST_GAIN, MARGIN, SAME_USE, row

HOLDS, NOT, OPEN = "holds", "does not hold", "undecided"


def span(low: float, high: float) -> dict[str, float]:
    return {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.02, 0.03, HOLDS),  # on par
        (0.1, 0.2, HOLDS),  # better than its teacher
        (-MARGIN, 0.0, HOLDS),
        (-0.2, -0.06, NOT),
        (-0.08, 0.01, OPEN),
        (-0.051, 0.2, OPEN),
    ],
)
def test_student(low: float, high: float, outcome: str) -> None:
    assert claims.student(span(low, high)) == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.08, 0.2, HOLDS),
        (LEAST_GAIN, LEAST_GAIN, HOLDS),
        (0.01, 0.06, NOT),  # a gain, but a smaller one
        (-0.1, 0.0, NOT),
        (0.046, 0.125, OPEN),
    ],
)
def test_gain(low: float, high: float, outcome: str) -> None:
    assert claims.gain(span(low, high)) == outcome


@pytest.mark.parametrize(
    ("matched", "elsewhere", "lost", "outcome"),
    [
        (span(0.05, 0.2), span(-0.02, 0.03), span(0.04, 0.2), HOLDS),
        (span(0.05, 0.2), span(-0.2, -0.1), span(0.2, 0.4), HOLDS),
        (span(0.05, 0.2), span(0.01, 0.2), span(0.02, 0.1), NOT),  # some of it carried over
        (span(0.05, 0.2), span(-0.02, 0.2), span(-0.1, 0.1), OPEN),
        (span(-0.01, 0.2), span(-0.2, 0.0), span(0.1, 0.2), OPEN),  # nothing to carry over
    ],
)
def test_transfer(matched: dict, elsewhere: dict, lost: dict, outcome: str) -> None:
    assert claims.transfer(matched, elsewhere, lost) == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(-0.1, 0.02, HOLDS), (-0.3, -0.1, HOLDS), (0.06, 0.2, NOT), (0.0, 0.1, OPEN)],
)
def test_thinking(low: float, high: float, outcome: str) -> None:
    assert claims.thinking(span(low, high)) == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.3, HOLDS), (0.0, 0.0, NOT), (-0.1, -0.02, NOT), (0.0, 0.2, OPEN)],
)
def test_exploitation(low: float, high: float, outcome: str) -> None:
    assert claims.exploitation(span(low, high)) == outcome


def test_tools() -> None:
    still, wide = span(-SAME_USE / 2, SAME_USE / 2), span(-0.4, 0.4)
    assert claims.tools({"view": still, "edit": span(0.01, 0.3)}) == HOLDS
    assert claims.tools({"view": span(-0.2, -0.1), "edit": wide}) == HOLDS
    assert claims.tools({"view": still, "edit": still}) == NOT
    assert claims.tools({"view": still, "edit": wide}) == OPEN


def test_no_interval_is_both_or_more_certain_for_being_wider() -> None:
    """For every rule of one interval: what is undecided stays so when the interval grows."""
    edges = [x / 50 for x in range(-10, 11)]
    rules = (claims.student, claims.gain, claims.thinking, claims.exploitation)
    for rule, (low, high) in itertools.product(rules, itertools.combinations(edges, 2)):
        inner, outer = rule(span(low, high)), rule(span(low - 0.02, high + 0.02))
        assert outer in (inner, OPEN)


def test_what_was_not_measured_is_undecided_whatever_is_said() -> None:
    found = row("gain", None, "holds")
    assert found["outcome"] == OPEN and found["ours"] is None and "not measured" in found["note"]


def test_of_a_few_tasks_nothing_is_concluded() -> None:
    certain = {"mean": 0.3, "low": 0.25, "high": 0.35, "n": claims.LEAST_TASKS - 1}
    assert row("gain", certain, claims.gain(certain))["outcome"] == OPEN
    enough = certain | {"n": claims.LEAST_TASKS}
    assert row("gain", enough, claims.gain(enough))["outcome"] == HOLDS


def test_every_claim_names_the_papers_figure_and_its_place_and_a_rule() -> None:
    assert list(CLAIMS) == ["student", "gain", "transfer", "thinking", "exploitation", "tools"]
    for claim in CLAIMS.values():
        assert any(c.isdigit() for c in claim.paper)
        assert "§" in claim.source and "hold" in claim.rule
