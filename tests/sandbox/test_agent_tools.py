"""The agent's tools on a real sandbox: what they do, and what they say to wrong calls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sandbox.agent_tools import TOOLS, ToolBox, ToolCall, describe_failure
from sandbox.base import TestCase, TestReport, Tree
from sandbox.checks import Checks
from sandbox.local import LocalPool

SOURCE = """\
class Box:
    def clip(self, value, low):
        if value <= low:
            return low + 1
        return value


def other():
    return "low"
"""
TEST = """\
from box import Box, other

def test_clip():
    assert Box().clip(1, 2) == 2

def test_keep():
    assert Box().clip(3, 2) == 3
"""
CHECKS = Checks(("test_box.py::test_clip",), ("test_box.py::test_keep",))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "box.py").write_text(SOURCE)
    (tmp_path / "test_box.py").write_text(TEST)
    return Tree(tmp_path)


def converse(
    tree: Tree, *calls: ToolCall, function: str = "Box.clip", checks: Checks = CHECKS
) -> tuple[list[str], str]:
    """The observations of some calls in one episode, and the diff it leaves."""

    async def run() -> tuple[list[str], str]:
        pool = LocalPool(1)
        try:
            async with pool.lease(tree) as sandbox:
                box = ToolBox(sandbox, checks, "box.py", function)
                return [(await box.call(call)).text for call in calls], await sandbox.diff()
        finally:
            await pool.close()

    return asyncio.run(run())


def test_where_every_test_is_hidden_none_passes(tree: Tree) -> None:
    (text,), _ = converse(tree, RUN, checks=Checks((), ()))
    assert text == "no test of this task can be run here"


def edit(**arguments: object) -> ToolCall:
    return ToolCall("edit", {"path": "box.py", **arguments})


RUN = ToolCall("run_tests", {})


def test_a_bug_outside_any_function_is_in_all_of_its_module(tree: Tree) -> None:
    change = ToolCall("edit", {"old": "class Box", "new": "class  Box"})
    (seen, edited), diff = converse(tree, ToolCall("view", {}), change, function="<module>")
    assert seen.startswith("1 ") and "class Box" in seen
    assert not edited.startswith("error") and "+class  Box" in diff


def test_a_repair(tree: Tree) -> None:
    texts, diff = converse(
        tree,
        RUN,
        ToolCall("view", {}),
        ToolCall("edit", {"old": " <=", "new": " <"}),
        RUN,
        edit(old=" + 1", new="", undo=True),
        RUN,
    )
    assert texts[0] == (
        "1 of 2 tests fail\ntest_box.py:4 test_clip: assert Box().clip(1, 2) == 2\n"
        "AssertionError: assert 3 == 2"
    )
    assert texts[1].splitlines()[0] == "2     def clip(self, value, low):"
    assert texts[1].splitlines()[-1] == "5         return value"
    assert texts[2:] == ["edited", "still failing, same errors", "edited", "all 2 tests pass"]
    changed = [
        line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert changed == ["-            return low + 1", "+            return low"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (ToolCall("shell", {"command": "id"}), "no tool 'shell'"),
        (ToolCall("edit", {"path": "box.py"}), "edit needs 'old'"),
        (ToolCall("view", {"path": "box.py", "depth": 3}), "no argument 'depth'"),
        (ToolCall("view", {"path": "box.py", "line": "3"}), "must be an integer"),
        (ToolCall("view", {"path": "box.py", "line": True}), "must be an integer"),
        (ToolCall("view", {"path": "box.py", "symbol": "Box.gone"}), "no function 'Box.gone'"),
        (ToolCall("view", {"path": "box.py", "line": 99}), "has 9 lines"),
        (ToolCall("view", {"path": "../../etc/passwd"}), "error"),
        (ToolCall("view", {"path": "/etc/passwd"}), "error"),
        (edit(old=" <"), "edit needs 'new'"),
        (edit(old="<=", new="<="), "old and new are the same"),
        (edit(old="", new="<"), "old is empty"),
        (edit(old="lower", new="low"), "old occurs 0 times in box.py"),
        (edit(old="return", new="yield"), "old occurs 3 times in box.py"),
        (ToolCall("edit", {"old": "return", "new": "yield"}), "old occurs 2 times in Box.clip"),
        (ToolCall("edit", {"old": "other", "new": "another"}), "old occurs 0 times in Box.clip"),
        (edit(old="low", new="high", symbol="Box.gone"), "no function 'Box.gone'"),
        (ToolCall("edit", {"path": "gone.py", "old": "x", "new": "y"}), "gone.py"),
        (ToolCall("search", {"text": ""}), "one line of text"),
    ],
)
def test_wrong_calls_are_answered_and_change_nothing(tree: Tree, call: ToolCall, says: str) -> None:
    texts, diff = converse(tree, call)
    assert texts[0].startswith("error: ") and says in texts[0]
    assert diff == ""


def test_an_edit_may_run_over_several_lines_and_keeps_the_other_line_ends(tree: Tree) -> None:
    (tree.root / "box.py").write_bytes(SOURCE.replace("\n", "\r\n").encode())
    old, new = "<= low:\r\n            return low + 1", "< low:\r\n            return low"
    _, diff = converse(tree, edit(old=old, new=new))
    added = [line for line in diff.split("\n") if line.startswith("+") and line[:3] != "+++"]
    assert added == ["+        if value < low:\r", "+            return low\r"]


def test_undo_takes_back_every_edit_even_when_the_next_one_is_refused(tree: Tree) -> None:
    texts, diff = converse(
        tree,
        edit(old="<=", new="<"),
        edit(old=" + 1", new=" + 2"),
        edit(old=" + 2", new="", undo=True),
    )
    assert texts[2] == "error: old occurs 0 times in box.py"
    assert diff == ""


def test_an_edit_looks_in_one_function_alone(tree: Tree) -> None:
    texts, diff = converse(tree, edit(old="low", new="high", symbol="other"))
    assert texts == ["edited"]
    assert '-    return "low"' in diff.splitlines() and '+    return "high"' in diff.splitlines()


def test_an_edit_of_a_file_that_does_not_parse_looks_in_all_of_it(tree: Tree) -> None:
    broken = ToolCall("edit", {"old": "value, low):", "new": "value, low:"})
    texts, diff = converse(
        tree, broken, ToolCall("edit", {"old": "value, low:", "new": "value, low):"})
    )
    assert texts == ["edited", "edited"] and diff == ""


def test_lines_are_counted_as_python_counts_them(tree: Tree) -> None:
    """A form feed ends no line of Python, though `str.splitlines` says so."""
    (tree.root / "box.py").write_text("A = 1\n\f\nB = '\x1c'\n" + SOURCE)
    texts, diff = converse(
        tree, ToolCall("view", {}), ToolCall("edit", {"old": "return value", "new": "return low"})
    )
    assert texts[0].splitlines()[0] == "5     def clip(self, value, low):"
    assert texts[1] == "edited" and "+        return low" in diff.splitlines()


def test_search_is_literal_and_never_reaches_a_shell(tree: Tree) -> None:
    texts, _ = converse(
        tree,
        ToolCall("search", {"text": "return low"}),
        ToolCall("search", {"text": "-rf $(touch /tmp/x) .*"}),
    )
    assert texts == ["box.py:4:            return low + 1", "nothing found"]


def test_a_file_that_no_longer_parses_is_reported(tree: Tree) -> None:
    texts, _ = converse(
        tree,
        edit(old="Box:", new="Box("),
        ToolCall("view", {"path": "box.py", "symbol": "Box.clip"}),
        RUN,
    )
    assert texts[1].startswith("error: ")
    assert "tests fail" in texts[2]


def test_submit_ends_the_episode(tree: Tree) -> None:
    async def run() -> bool:
        pool = LocalPool(1)
        try:
            async with pool.lease(tree) as sandbox:
                box = ToolBox(sandbox, CHECKS, "box.py", "Box.clip")
                return (await box.call(ToolCall("submit", {}))).done
        finally:
            await pool.close()

    assert asyncio.run(run())


def test_schemas_are_what_the_chat_template_expects() -> None:
    for tool in TOOLS:
        assert tool["type"] == "function"
        parameters = tool["function"]["parameters"]
        assert set(parameters["required"]) <= set(parameters["properties"])
    names: list[str] = [tool["function"]["name"] for tool in TOOLS]
    assert names == ["view", "search", "edit", "run_tests", "submit"]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("<Box object at 0x7fae345ea00>", "<Box object at 0x>"),
        ("'/tmp/tmpl4b7nvs1/temp' != ''", "'/tmp/tmp/temp' != ''"),
        ("tmp_b7nvs10.txt is missing", "tmp.txt is missing"),
        ("no tmpfile, no tmp, 0 x", "no tmpfile, no tmp, 0 x"),
    ],
)
def test_what_differs_from_run_to_run_is_not_shown(error: str, shown: str) -> None:
    case = TestCase("test_a.py::test_a", "failed", error)
    report = TestReport((case,), 1, False, None, 0.1, "")
    assert describe_failure(report).splitlines()[-1] == shown
