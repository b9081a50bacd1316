"""Turns that put a new edit to the test stand out from those that edit in vain."""

from __future__ import annotations

import pytest

from rl.credit import fresh_turns, turn_credits
from sft.trajectory import Trajectory, Turn

RUN = {"name": "run_tests", "arguments": {}}
VIEW = {"name": "view", "arguments": {}}
FAIL = "still failing, same errors"
ABSENT = "error: old occurs 0 times in f"


def edit(old: str, new: str, **more: object) -> dict:
    return {"name": "edit", "arguments": {"old": old, "new": new, **more}}


def episode(*turns: tuple[list[dict], list[str]]) -> Trajectory:
    found = Trajectory("t", "p", "o", "train", "rl", 0, 0, "")
    found.turns = [Turn("", calls, answers) for calls, answers in turns]
    return found


A, B = edit("a", "b"), edit("a", "c", undo=True)
AGAIN = edit("a", "b", undo=True)


@pytest.mark.parametrize(
    ("turns", "fresh"),
    [
        ([([RUN, VIEW], [FAIL, "1 x"])], [None]),
        ([([A, RUN], ["edited", FAIL]), ([B, RUN], ["edited", FAIL])], [True, True]),
        ([([A, RUN], ["edited", FAIL]), ([AGAIN, RUN], ["edited", FAIL])], [True, False]),
        ([([A, RUN], [ABSENT, FAIL]), ([A, RUN], ["edited", FAIL])], [False, True]),
        ([([A], ["edited"]), ([RUN], [FAIL])], [False, None]),
        ([([A, RUN], ["error: no complete tool call", "edited", FAIL])], [False]),
        ([([A, RUN, B, RUN], [ABSENT, FAIL, "edited", FAIL])], [True]),
        ([([A, RUN, edit("a", "b", symbol="g"), RUN], ["edited", FAIL] * 2)], [True]),
    ],
)
def test_which_turns_test_something_new(turns: list, fresh: list) -> None:
    assert fresh_turns(episode(*turns)) == fresh


def test_credit_is_relative_to_the_group() -> None:
    good = episode(([VIEW], ["1 x"]), ([A, RUN], ["edited", FAIL]), ([B, RUN], ["edited", FAIL]))
    bad = episode(([A, RUN], [ABSENT, FAIL]), ([A, RUN], [ABSENT, FAIL]))
    credit = turn_credits([good, bad], 0.4)
    assert credit == [pytest.approx([0.0, 0.2, 0.2]), pytest.approx([-0.2, -0.2])]
    assert turn_credits([good, good], 0.4) == [[0.0] * 3] * 2
    assert turn_credits([episode(([VIEW], ["1 x"]))], 0.4) == [[0.0]]
