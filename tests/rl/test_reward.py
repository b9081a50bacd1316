"""Reward: a repair is worth most, and a failed episode its tested tries, if a run asks for that."""

from __future__ import annotations

import pytest

from configs.errors import InputError
from rl.reward import MAX_EFFORT, RewardConfig, count_tries, reward
from sft.trajectory import Trajectory, Turn

RUN = {"name": "run_tests", "arguments": {}}
FAIL = "still failing, same errors"


def edit(old: str, new: str, **more: object) -> dict:
    return {"name": "edit", "arguments": {"old": old, "new": new, **more}}


def episode(*turns: tuple[list[dict], list[str]], verdict: str = "fail") -> Trajectory:
    found = Trajectory("t", "p", "o", "train", "rl", 0, 0, "")
    found.turns = [Turn("", calls, answers) for calls, answers in turns]
    found.verdict = {"verdict": verdict}
    return found


A, B = edit("a", "b"), edit("a", "c", undo=True)


@pytest.mark.parametrize(
    ("turns", "count"),
    [
        ([], 0),
        ([([A, RUN], ["edited", FAIL])], 1),
        ([([A, RUN], ["edited", FAIL]), ([B, RUN], ["edited", FAIL])], 2),
        # the same again, with or without undo
        ([([A, RUN], ["edited", FAIL]), ([edit("a", "b", undo=True), RUN], ["edited", FAIL])], 1),
        # refused, never tested, several in one test run, a test run alone
        ([([A, RUN], ["error: old occurs 0 times in f", FAIL])], 0),
        ([([A], ["edited"])], 0),
        ([([A, B, RUN], ["edited", "edited", FAIL])], 1),
        ([([RUN, RUN], ["1 of 2 tests fail", FAIL])], 0),
        # another function is another edit
        ([([A, RUN, edit("a", "b", symbol="g"), RUN], ["edited", FAIL, "edited", FAIL])], 2),
        # tested in a later turn
        ([([A], ["edited"]), ([RUN], [FAIL])], 1),
        # a malformed call before it: which answer belongs to which call is not known
        ([([A, RUN], ["error: no complete tool call", "edited", FAIL])], 0),
    ],
)
def test_tries_that_count(turns: list, count: int) -> None:
    found = episode(*turns)
    assert count_tries(found) == count
    assert reward(found, RewardConfig()) == 0.0
    assert reward(found, RewardConfig(effort=0.05)) == pytest.approx(0.05 * count)


def test_no_effort_is_worth_a_repair() -> None:
    many = [([edit("a", str(i)), RUN], ["edited", FAIL]) for i in range(100)]
    assert reward(episode(*many), RewardConfig(effort=1.0)) == MAX_EFFORT < 1.0
    assert reward(episode(verdict="pass"), RewardConfig(effort=1.0)) == 1.0


def test_a_negative_effort_is_refused() -> None:
    with pytest.raises(InputError, match=r"reward\.effort must not be negative"):
        RewardConfig(effort=-0.1)
