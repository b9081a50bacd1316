"""The teacher repairs from what the tools show it, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.agent_tools import ToolCall
from sft.teacher import RUN, SUBMIT, VIEW, SearchTeacher, edit_call

INSTRUCTION = (
    "Tests fail because of a bug in `Box.clip` in `src/box.py`.\n"
    "Failing: tests/test_box.py::test_clip\nFix the source; do not change the tests."
)
BUGGY = [
    "    def clip(self, value):",
    "        if value <= self.low:",
    "            return self.high",
    "        return value",
]
SHOWN = "\n".join(f"{n} {line}" for n, line in enumerate(BUGGY, 41))
FAILURE = "1 of 3 tests fail\nsrc/box.py:42 clip: if value <= self.low:\nTypeError: unorderable"


def episode(seed: int, turns: int = 400) -> list[list[ToolCall]]:
    """Everything the teacher does when no edit ever helps."""
    teacher = SearchTeacher(seed)
    acted = [teacher.act([INSTRUCTION]), teacher.act([FAILURE, SHOWN])]
    while acted[-1] != [SUBMIT] and len(acted) < turns:
        acted.append(teacher.act(["edited", "still failing, same errors"]))
    return acted


def test_it_looks_before_it_edits() -> None:
    first = episode(0)[0]
    assert first == [RUN, VIEW]


def applied(arguments: Mapping[str, Any]) -> str:
    """The function that an edit leaves."""
    text = "\n".join(BUGGY)
    assert text.count(arguments["old"]) == 1
    return text.replace(arguments["old"], arguments["new"])


def changed_line(arguments: Mapping[str, Any]) -> int:
    """Number of the line that an edit changes."""
    pairs = zip(BUGGY, applied(arguments).split("\n"), strict=True)
    (line,) = (n for n, (old, new) in enumerate(pairs, 41) if old != new)
    return line


def test_every_edit_changes_one_line_and_none_repeats() -> None:
    edits = [calls[0].arguments for calls in episode(1)[1:-1]]
    assert len(edits) >= 8
    for number, edit in enumerate(edits):
        assert changed_line(edit)
        assert bool(edit.get("undo")) == (number > 0)
    assert len({applied(edit) for edit in edits}) == len(edits)


def test_the_reverse_of_a_reversible_bug_is_among_its_candidates() -> None:
    tried = {applied(calls[0].arguments) for calls in episode(2)[1:-1]}
    assert "\n".join(BUGGY).replace("<=", "<") in tried


def test_lines_of_the_traceback_come_first_more_often() -> None:
    hot = sum(changed_line(episode(seed, 3)[1][0].arguments) == 42 for seed in range(300))
    quiet = 0
    for seed in range(300):
        teacher = SearchTeacher(seed)
        teacher.act([INSTRUCTION])
        call = teacher.act(["1 of 3 tests fail\nAssertionError", SHOWN])[0]
        quiet += changed_line(call.arguments) == 42
    assert hot > quiet + 40


@pytest.mark.parametrize(
    ("before", "old", "new", "quoted", "put"),
    [
        ([], "if a == b and c == d:", "if a == b and c != d:", " == d", " != d"),
        ([], "    return x", "    return not x", " x", " not x"),
        ([], "return not x", "return x", " not", ""),
        ([], "x = f(a, b)", "x = f(b, a)", "(a, b", "(b, a"),
        ([], "s[0] = t[-1]", "s[-1] = t[-1]", "[0", "[-1"),
        ([], "total = 10", "total = 11", " 10", " 11"),
        ([], "a.pop()", "a.pop() + 1", "()", "() + 1"),
        (["y = x"], "z = x", "z = y", "z = x", "z = y"),
        (["if y:", "  x = 1"], "  x = 1", "  x = 2", "  x = 1\n  x = 1", "  x = 1\n  x = 2"),
    ],
)
def test_an_edit_quotes_whole_names_and_operators(
    before: list[str], old: str, new: str, quoted: str, put: str
) -> None:
    call = edit_call([*before, old], len(before) + 1, new)
    assert call == ToolCall("edit", {"old": quoted, "new": put})


LINE = st.text(st.sampled_from("ab1_ (.,=<\"'é"), min_size=1, max_size=12)


@given(st.lists(LINE, min_size=1, max_size=4), st.data())
def test_an_edit_is_unambiguous_and_gives_the_new_line(
    lines: list[str], data: st.DataObject
) -> None:
    line, new = data.draw(st.integers(1, len(lines))), data.draw(LINE)
    if new == lines[line - 1]:
        return
    arguments, text = edit_call(lines, line, new).arguments, "\n".join(lines)
    part = arguments["old"]
    assert sum(text.startswith(part, i) for i in range(len(text))) == 1
    wanted = [*lines[: line - 1], new, *lines[line:]]
    assert text.replace(part, arguments["new"]) == "\n".join(wanted)


def test_it_submits_when_the_tests_pass_and_when_it_can_do_nothing() -> None:
    teacher = SearchTeacher(0)
    teacher.act([INSTRUCTION])
    teacher.act([FAILURE, SHOWN])
    assert teacher.act(["edited", "all 3 tests pass"]) == [SUBMIT]
    assert SearchTeacher(0).act(["Nothing that it understands."]) == [SUBMIT]


def test_the_seed_decides_the_search() -> None:
    assert episode(5) == episode(5)
    assert episode(5) != episode(6)
