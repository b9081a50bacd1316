"""A share of tests is hidden: never run for the agent, not in its tree, wanted by the verdict."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from configs.errors import InputError
from model.tokenizer import Tokenizer
from rl.agent import AgentConfig, Reply, run_episode
from sandbox.agent_tools import ToolCall
from sandbox.environments import Setting
from sandbox.hidden import hidden_tests
from sandbox.local import LocalPool
from sandbox.task import Task, load_tasks
from sft.chat import Renderer
from sft.trajectory import Trajectory
from tests.tools.hosts import CONFIG, MODULE, prepare


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """`lt` answers as `ge`; five tests of other functions pass."""
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return next(t for t in load_tasks(CONFIG["tasks"]["index"]) if t.function == "lt")


class Scripted:
    """A policy that makes these calls, a turn each."""

    name = "scripted"

    def __init__(self, renderer: Renderer, calls: list[ToolCall]) -> None:
        self._renderer, self._calls = renderer, iter(calls)

    async def open(self, seed: int) -> Scripted:
        return self

    async def reply(self, ids: object, texts: object, max_new: int) -> Reply:
        written = self._renderer.reply([next(self._calls)])
        return Reply(written, [0.0] * len(written), ended=True)

    def close(self) -> None: ...


def play(task: Task, tokenizer: Tokenizer, hide: float, *calls: ToolCall) -> Trajectory:
    config = AgentConfig(max_turns=9, max_tokens=9999, max_new_tokens=999)
    renderer = Renderer(tokenizer)

    async def go() -> Trajectory:
        pool = LocalPool(2)
        try:
            policy = Scripted(renderer, list(calls))
            setting = Setting(hide_tests=hide)
            return await run_episode(task, policy, pool, renderer, config, 0, setting)  # type: ignore[arg-type]
        finally:
            await pool.close()

    return asyncio.run(go())


RUN, SUBMIT = ToolCall("run_tests", {}), ToolCall("submit", {})
REPAIR = ToolCall("edit", {"old": "a >= b", "new": "a < b", "symbol": "lt", "path": MODULE})
BREAK = ToolCall("edit", {"old": "a >= b", "new": "a > b", "symbol": "ge", "path": MODULE})


def test_what_is_hidden_is_the_same_each_time_and_never_what_is_named(task: Task) -> None:
    every = (*task.fail_to_pass, *task.pass_to_pass)
    assert len(every) == 6 and hidden_tests(task, 0.0) == ()
    assert hidden_tests(task, 1.0) == task.pass_to_pass  # the instruction names the failing one
    some = hidden_tests(task, 0.4)
    assert len(some) == 2 and set(some) < set(task.pass_to_pass)
    assert some == hidden_tests(task, 0.4) == tuple(t for t in every if t in set(some))
    assert set(hidden_tests(task, 0.2)) <= set(some)
    assert hidden_tests(task, "failing") == task.fail_to_pass


def test_a_repair_that_fits_what_was_shown_earns_nothing(task: Task, tokenizer: Tokenizer) -> None:
    seen = play(task, tokenizer, 1.0, REPAIR, BREAK, RUN, SUBMIT)
    assert seen.turns[2].observations == ["all 1 tests pass"]
    assert seen.verdict["verdict"] == "fail" and seen.reward == 0.0
    open_ = play(task, tokenizer, 0.0, REPAIR, BREAK, RUN, SUBMIT)
    assert open_.turns[2].observations[0].startswith("1 of 6 tests fail")
    right = play(task, tokenizer, 1.0, REPAIR, RUN, SUBMIT)
    assert right.verdict["verdict"] == "pass" and right.reward == 1.0
    assert len(right.verdict["pass_to_pass"]) == 5  # all were run


def test_no_tool_shows_a_hidden_test(task: Task, tokenizer: Tokenizer) -> None:
    path = task.fail_to_pass[0].partition("::")[0]
    names = [test.partition("::")[2] for test in hidden_tests(task, 0.5)]
    assert names
    look = [ToolCall("view", {"path": path}), *(ToolCall("search", {"text": n}) for n in names)]
    seen = [turn.observations[0] for turn in play(task, tokenizer, 0.5, *look, SUBMIT).turns]
    assert "assert" in seen[0] and not any(f"def {name}" in seen[0] for name in names)
    assert set(seen[1:-1]) == {"nothing found"}
    shown = [turn.observations[0] for turn in play(task, tokenizer, 0.0, *look, SUBMIT).turns]
    assert all(f"def {name}" in shown[0] for name in names) and path in shown[1]


def test_a_share_is_a_share() -> None:
    with pytest.raises(InputError, match="hide_tests is a share from 0 to 1, or failing: 1.5"):
        Setting(hide_tests=1.5)
