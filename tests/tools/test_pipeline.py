"""What the stages hand to one another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import InputError
from configs.schema import load
from sandbox.importers.harbor import write_harbor
from tests.tools.hosts import ROOT
from tools.pipeline import _tasks, solved_tasks
from tools.run_config import RunConfig, check


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


@pytest.mark.parametrize("name", ["quickstart", "sft-32b", "grpo-32b"])
def test_the_shipped_configs_are_taken_and_rows_that_are_too_short_are_not(name: str) -> None:
    """row_targets 0 is a slot for every token of a row."""
    path = ROOT / "configs" / f"{name}.yaml"
    check(load(RunConfig, path), rl=name != "sft-32b")
    with pytest.raises(InputError, match="sft.row_targets must be at least"):
        check(load(RunConfig, path, ["sft.row_targets=8"]), rl=False)


def test_tasks_that_need_images_are_refused_before_a_run(tmp_path: Path) -> None:
    for path, text in {
        "task.toml": "[environment]\ndocker_image = 'acme:1'\n",
        "instruction.md": "Do it.",
        "tests/test.sh": "exit 1\n",
    }.items():
        (tmp_path / "foreign" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "foreign" / path).write_text(text)
    write_harbor(tmp_path / "foreign", tmp_path / "tasks" / "foreign", "train")
    path = ROOT / "configs/quickstart.yaml"
    config = load(RunConfig, path, [f"tasks.index={tmp_path / 'tasks'}"])
    with pytest.raises(InputError, match="1 train tasks need container images.*acme:1"):
        _tasks(config.tasks, "train", 0)


def test_a_shell_in_a_plain_sandbox_is_refused_before_work_starts() -> None:
    path = ROOT / "configs" / "quickstart.yaml"
    bare = ["environment=full", "sandbox.backend=plain"]
    with pytest.raises(InputError, match="shell_without_isolation"):
        check(load(RunConfig, path, bare), rl=False)
    check(load(RunConfig, path, [*bare, "sandbox.shell_without_isolation=true"]), rl=False)
    check(load(RunConfig, path, ["environment=full"]), rl=False)
    assert load(RunConfig, path).environment == "simplified"
    with pytest.raises(InputError, match="environment: expected 'simplified' or 'full'"):
        load(RunConfig, path, ["environment=whole"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft.validation.share=1.0"], "below 1"),
        (["sft.validation.patience=2"], "set sft.validation.share"),
        (["sft.validation.best=1", "sft.validation.share=0.1", "sft.validation.every=0"], "every"),
        (["sft.validation.success_every=-1"], "success_every may not be below 0"),
        (["sft.validation.success_tasks=0"], "success_tasks must be at least 1"),
        (["sft.spikes.factor=0.5"], "factor must be above 1"),
        (["sft.spikes.factor=2.0", "sft.spikes.window=0"], "window and stop at least 1"),
        (["teach.teacher=dataset"], "goes with teach.teacher=dataset"),
        (["teach.dataset=data"], "goes with teach.teacher=dataset"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides: list[str], message: str) -> None:
    config = load(RunConfig, ROOT / "configs/quickstart.yaml", overrides)
    with pytest.raises(InputError, match=message):
        check(config, rl=False)
