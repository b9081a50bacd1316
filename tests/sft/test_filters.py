"""Which episodes SFT learns from, and what is said of the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.examples import Examples, weights
from sft.filters import FilterConfig, HeldOut, likeness, reason
from sft.trajectory import DROPPED, ENVIRONMENT, POLICY, Trajectory, Turn

LINES = [
    "total = sum(value for value in values if value)",
    "if not total:",
    "    raise ValueError('there is nothing to divide')",
    "share = [value / total for value in values]",
    "for position, part in enumerate(share):",
    "    found[position] = round(part * 100, digits)",
    "return found, total, len(share)",
]
SOURCE = "def other():\n    return 1\n\n\ndef shares(values, digits, found):\n" + "".join(
    f"    {line}\n" for line in LINES
)


def episode(task: str = "t", **more: Any) -> Trajectory:
    call = {"name": "edit", "arguments": {"old": "a", "new": "b"}}
    found = Trajectory(task, "mini", "op", "train", "teacher", 0, -1, "Repair it.")
    found.turns = [Turn("", [call], ["done"])]
    found.verdict, found.stop, found.patch = {"verdict": "pass"}, "submit", f"-a\n+b {task}\n"
    found.add([1, 2, 3], ENVIRONMENT)
    found.add([4, 5], POLICY)
    for name, value in more.items():
        setattr(found, name, value)
    return found


def heldout(tmp_path: Path, bug: str = "", package: str = "elsewhere", **more: bool) -> HeldOut:
    """Of one task whose function is `shares`, with a bug or without."""
    (tmp_path / "m.py").write_text(SOURCE)
    overlay = {"m.py": SOURCE.replace("if not total", bug).encode()} if bug else {}
    tree = SimpleNamespace(root=tmp_path, overlay=overlay)
    task: Any = SimpleNamespace(
        package=package, module="m.py", function="shares", tree=lambda: tree
    )
    return HeldOut([task], **more)


@pytest.mark.parametrize(
    ("keep", "change", "why"),
    [
        ({}, {}, ""),
        ({}, {"verdict": {"verdict": "fail"}}, "not verified"),
        ({}, {"verdict": {"verdict": "quarantine"}}, "not verified"),
        ({}, {"verdict": {}}, "not verified"),
        ({}, {"stop": "turns"}, ""),
        ({"submitted": True}, {"stop": "turns"}, "not submitted"),
        ({"max_tokens": 5}, {}, ""),
        ({"max_tokens": 4}, {}, "too many tokens"),
        ({"max_turns": 1}, {}, ""),
        ({"max_turns": 1}, {"turns": [Turn("", [], [])] * 2}, "too many turns"),
        ({"max_errors": 0}, {}, ""),
        ({"max_errors": 0}, {"turns": [Turn("", [], ["error: no"])]}, "too many errors"),
        ({"max_errors": 1}, {"turns": [Turn("", [], ["error: no", "an error: x"])]}, ""),
    ],
)
def test_an_episode_alone(keep: dict, change: dict, why: str) -> None:
    assert reason(FilterConfig(**keep), episode(**change), None) == why


def test_one_patch_of_a_task_once() -> None:
    there = [
        *(episode("a"), episode("a", verdict={"verdict": "fail"}), episode("a", seed=1)),
        *(episode("b", patch="-a\n+b a\n"), episode("a", patch="-a\n+c\n")),
        *(episode("c", patch=""), episode("c", patch="")),  # nothing to be alike in
    ]
    found = Examples(there)
    assert [kept.number for kept in found._kept] == [0, 3, 4, 5, 6]
    assert found.dropped == Counter({"not verified": 1, "has the patch of another": 1})
    assert len(Examples(there, FilterConfig(duplicates=False))) == 6
    assert likeness(episode("a")) != likeness(episode("b", patch="-a\n+b a\n"))


def numbered(lines: list[str]) -> str:
    return "\n".join(f"{n:>4} {line}".strip() for n, line in enumerate(lines, 10))


def test_lines_of_a_held_out_function_are_found_wherever_they_are_shown(tmp_path: Path) -> None:
    held, six = heldout(tmp_path), [f"    {line}" for line in LINES[:6]]
    shown = numbered(["x = 1", *six, "y = 2"])
    text = "\n".join(six)
    edit = {"name": "edit", "arguments": {"old": "a", "new": text}}
    patch = "--- a/m.py\n+++ b/m.py\n@@ -1,6 +1,6 @@\n" + "".join(
        f"{' -'[i == 2]}{line}\n" + (f"+{line} # x\n" if i == 2 else "")
        for i, line in enumerate(six)
    )
    for change in (
        {"turns": [Turn("", [], [shown])]},
        {"turns": [Turn("", [edit], ["done"])]},
        {"patch": patch},
        {"turns": [Turn("", [], [text.replace("\n", "\n\n    # a remark\n")])]},
    ):
        assert reason(FilterConfig(), episode(**change), held) == "shows a held-out task", change
        assert not reason(FilterConfig(heldout="no"), episode(**change), None)


def test_what_two_programs_share_is_no_sign(tmp_path: Path) -> None:
    held = heldout(tmp_path)
    five = numbered([f"    {line}" for line in LINES[:5]])
    apart = numbered([LINES[0], "z = 1", *LINES[1:6]])
    for shown in (five, apart, "def other():\n    return 1\n" * 9):
        assert not held.shown_in(episode(turns=[Turn("", [], [shown])]))


def test_the_bug_tells_as_well_as_the_fix(tmp_path: Path) -> None:
    wrong = [line.replace("if not total", "if total") for line in LINES]
    shown = episode(turns=[Turn("", [], [numbered(wrong[:6])])])
    assert not heldout(tmp_path).shown_in(shown)
    assert heldout(tmp_path, "if total").shown_in(shown)


def test_whole_packages_by_choice(tmp_path: Path) -> None:
    assert not heldout(tmp_path, package="mini").shown_in(episode())
    assert heldout(tmp_path, package="mini", packages=True).shown_in(episode())
    assert not heldout(tmp_path, package="other", packages=True).shown_in(episode())


def test_whole_tasks_are_held_back_the_same_each_time() -> None:
    there = [episode(f"t{n % 10}", patch=f"+{n}\n") for n in range(30)]
    train, held = Examples(there).split(0.2, seed=5)
    tasks = [{kept.task for kept in part._kept} for part in (train, held)]
    assert len(tasks[1]) == 2 and not tasks[0] & tasks[1] and len(train) + len(held) == 30
    again = Examples(list(reversed(there))).split(0.2, seed=5)[1]
    assert {kept.task for kept in again._kept} == tasks[1]
    assert {k.task for k in Examples(there).split(0.2, seed=6)[1]._kept} != tasks[1]
    assert len(Examples(there).split(0.001, seed=5)[1]) == 3  # at least one
    assert len(Examples(there).split(0.0, seed=5)[1]) == 0


def test_a_turn_or_an_episode_weighs_the_same_whatever_its_length() -> None:
    one = episode(turns=[Turn("", [], ["x"]), Turn("", [], ["y"])])
    one.ids, one.author, one.logprobs, one.versions = [], [], [], []
    for author, many in (
        (ENVIRONMENT, 3),
        (POLICY, 4),
        (ENVIRONMENT, 2),
        (POLICY, 1),
        (DROPPED, 5),
    ):
        one.add([7] * many, author)
    assert weights(one) == [0.0] * 3 + [1.0] * 4 + [0.0] * 2 + [1.0] + [0.0] * 5
    assert weights(one, "turn") == [0.0] * 3 + [0.25] * 4 + [0.0] * 2 + [1.0] + [0.0] * 5
    assert weights(one, "episode") == [0.0] * 3 + [0.2] * 4 + [0.0] * 2 + [0.2] + [0.0] * 5
    (example,) = Examples([one], weigh="turn")
    assert list(example.weight) == weights(one, "turn")
