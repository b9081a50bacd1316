"""What episodes are said to have done is what they did."""

from __future__ import annotations

from typing import Any

import pytest

from rl.analysis import (
    FAILURES,
    changes,
    edit_counts,
    edit_kind,
    edits_of,
    failure,
    shares,
    tool_counts,
    transitions,
)
from rl.episodes import Episode


def episode(task: str = "t", verdict: str = "fail", stop: str = "turns", **more: Any) -> Episode:
    """`calls`: (name, arguments, observation) of one turn."""
    calls = more.pop("calls", [])
    turn = {
        "text": "",
        "calls": [{"name": name, "arguments": arguments} for name, arguments, _ in calls],
        "observations": [said for *_, said in calls] or ["error: no complete tool call"],
    }
    found = {"fail_to_pass": {"a": "failed"}, "pass_to_pass": {"b": "passed"}, "flags": []}
    record = {
        "task": task, "policy": "sft", "turns": [turn], "stop": stop,
        "verdict": {"verdict": verdict, **found, **more},
    }  # fmt: skip
    return Episode("eval-sft", 0, record, 10, 5, {})


def edit(old: str, new: str, said: str = "edited") -> tuple[str, dict, str]:
    return "edit", {"old": old, "new": new}, said


RUN = ("run_tests", {}, "1 of 2 tests fail")


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("raise ValueError(x)", "pass", "check deleted"),
        ("assert a > b", "", "check deleted"),
        ("raise ValueError(x)", "raise TypeError(x)", "name"),
        ("f(x)", "try:\n    f(x)\nexcept Exception:\n    pass", "exception swallowed"),
        ("a < b", "a <= b", "comparison"),
        ("a is b", "a == b", "comparison"),
        ("a and b", "a or b", "boolean"),
        ("a", "not a", "boolean"),
        ("a + b", "a - b", "arithmetic"),
        ("x[1]", "x[0]", "constant"),
        ("'a'", "'b'", "constant"),
        ("return True", "return False", "constant"),
        ("left", "right", "name"),
        ("f(a, b)", "f(a)", "code removed"),
        ("f(a)", "f(a, b)", "code added"),
        ("return x + 1", "return  x+1", "layout"),
        ("a < 3", "b > 4", "other"),
    ],
)
def test_kinds_of_edits(old: str, new: str, kind: str) -> None:
    assert edit_kind(old, new) == kind


def test_each_next_call_has_its_share() -> None:
    one = episode(calls=[("view", {}, ""), edit("a", "b"), RUN])
    two = episode(calls=[("view", {}, ""), RUN])
    table = transitions([one, two])
    assert table["start"] == {"view": 1.0} and table["view"] == {"edit": 0.5, "run_tests": 0.5}
    assert table["run_tests"] == {"end": 1.0}
    assert all(sum(row.values()) == pytest.approx(1) for row in table.values())


def test_edits_know_whether_they_applied_also_where_a_call_could_not_be_read() -> None:
    missed = episode(calls=[edit("a", "b", "error: old occurs 0 times in f"), edit("c", "d")])
    assert [applied for *_, applied in edits_of(missed)] == [False, True]
    missed.record["turns"][0]["observations"].insert(0, "error: expected {...}")
    assert [applied for *_, applied in edits_of(missed)] == [True, True]
    missed.record["turns"][0]["observations"].remove("edited")
    assert [applied for *_, applied in edits_of(missed)] == [False, False]


def test_every_way_to_fail() -> None:
    wrong = {"fail_to_pass": {"a": "failed"}}
    missing = {"fail_to_pass": {"a": "missing"}, "pass_to_pass": {"b": "missing"}}
    broke = {"fail_to_pass": {"a": "passed"}, "pass_to_pass": {"b": "failed"}}
    good = ("run_tests", {}, "all 2 tests pass")
    found = {
        "exploit": episode(verdict="quarantine"),
        "sandbox": episode(verdict="error"),
        "tampered": episode(calls=[edit("a", "b")], flags=["protected:tests/test_a.py"]),
        "no call": episode(),
        "no edit": episode(calls=[("view", {}, "1 x")]),
        "edit missed": episode(calls=[edit("a", "b", "error: old occurs 0 times in f")]),
        "broken code": episode(calls=[edit("a", "b")], **missing),
        "regression": episode(calls=[edit("a", "b")], **broke),
        "undone": episode(calls=[edit("a", "b"), good], **wrong),
        "wrong repair": episode(calls=[edit("a", "b"), RUN], **wrong),
    }
    assert {way: failure(e) for way, e in found.items()} == {way: way for way in found}
    assert found.keys() == FAILURES.keys()
    assert failure(episode(verdict="pass")) == ""
    assert shares(["", "x", "x", "y"]) == {"x": 2 / 3, "y": 1 / 3}


def test_changes_are_paired_by_task_and_their_intervals_hold_together() -> None:
    """Every task has one call more of `view`, tasks themselves differ by far more."""
    before = [episode(f"t{n}", calls=[("view", {}, "")] * n + [RUN]) for n in range(8)]
    after = [episode(f"t{n}", calls=[("view", {}, "")] * (n + 1) + [RUN]) for n in range(8)]
    found = changes([(before, after)], tool_counts)
    assert list(found) == ["view", "run_tests"]
    assert found["view"]["mean"] == found["view"]["low"] == found["view"]["high"] == 1.0
    assert (found["view"]["before"], found["view"]["after"]) == (3.5, 4.5)
    assert found["run_tests"]["mean"] == 0.0
    edited = [episode(f"t{n}", calls=[edit("a < b", "a > b")]) for n in range(8)]
    assert changes([(before, edited)], edit_counts)["comparison"]["mean"] == 1.0
