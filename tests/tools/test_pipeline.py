"""What the stages hand to one another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tools.pipeline import solved_tasks


def _task(name: str) -> Any:
    return SimpleNamespace(name=name)


def _episode(task: str, success: bool) -> Any:
    return SimpleNamespace(task=task, success=success)


def test_solved_tasks_keep_their_order_and_one_success_is_enough() -> None:
    tasks = [_task(name) for name in "abcd"]
    episodes = [
        *(_episode("d", False), _episode("d", True)),
        *(_episode("b", True), _episode("a", False), _episode("elsewhere", True)),
    ]
    assert [task.name for task in solved_tasks(tasks, episodes)] == ["b", "d"]
    assert solved_tasks(tasks, []) == []
