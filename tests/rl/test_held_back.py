"""Tests that are held back: never run for the agent, never shown, and wanted by the verdict."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from configs.errors import InputError
from model.tokenizer import Tokenizer
from rl.agent import AgentConfig, Reply, run_episode
from sandbox.agent_tools import ToolCall
from sandbox.held_back import shown_tests
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


def play(task: Task, tokenizer: Tokenizer, held_back: float, *calls: ToolCall) -> Trajectory:
    config = AgentConfig(max_turns=9, max_tokens=9999, max_new_tokens=999, held_back=held_back)
    renderer = Renderer(tokenizer)

    async def go() -> Trajectory:
        pool = LocalPool(2)
        try:
            policy = Scripted(renderer, list(calls))
            return await run_episode(task, policy, pool, renderer, config, 0)  # type: ignore[arg-type]
        finally:
            await pool.close()

    return asyncio.run(go())


RUN, SUBMIT = ToolCall("run_tests", {}), ToolCall("submit", {})
REPAIR = ToolCall("edit", {"old": "a >= b", "new": "a < b", "symbol": "lt", "path": MODULE})
BREAK = ToolCall("edit", {"old": "a >= b", "new": "a > b", "symbol": "ge", "path": MODULE})


def test_what_is_held_back_is_the_same_each_time_and_never_all(task: Task) -> None:
    every = (*task.fail_to_pass, *task.pass_to_pass)
    assert len(every) == 6 and shown_tests(task, 0.0) == every
    assert shown_tests(task, 1.0) == task.fail_to_pass  # the instruction names it
    some = shown_tests(task, 0.4)
    assert len(some) == 4 and set(some) < set(every) and some[0] == every[0]
    assert some == shown_tests(task, 0.4) == tuple(t for t in every if t in set(some))
    assert set(some) <= set(shown_tests(task, 0.2))


def test_a_repair_that_fits_what_was_shown_earns_nothing(task: Task, tokenizer: Tokenizer) -> None:
    seen = play(task, tokenizer, 1.0, REPAIR, BREAK, RUN, SUBMIT)
    assert seen.turns[2].observations == ["all 1 tests pass"]
    assert seen.verdict["verdict"] == "fail" and seen.reward == 0.0
    open_ = play(task, tokenizer, 0.0, REPAIR, BREAK, RUN, SUBMIT)
    assert open_.turns[2].observations[0].startswith("1 of 6 tests fail")
    right = play(task, tokenizer, 1.0, REPAIR, RUN, SUBMIT)
    assert right.verdict["verdict"] == "pass" and right.reward == 1.0
    assert len(right.verdict["pass_to_pass"]) == 5  # all were run


def test_no_tool_shows_a_file_of_tests(task: Task, tokenizer: Tokenizer) -> None:
    test = task.fail_to_pass[0].partition("::")[0]
    calls = [
        ToolCall("view", {"path": test}),
        ToolCall("view", {"path": f"src/../{test}"}),
        ToolCall("edit", {"path": test, "old": "assert", "new": "assert 1 or"}),
        ToolCall("search", {"text": "assert"}),
        ToolCall("search", {"text": "return a"}),
        SUBMIT,
    ]
    seen = [turn.observations[0] for turn in play(task, tokenizer, 0.5, *calls).turns]
    assert all("is not shown" in text for text in seen[:3]) and seen[3] == "nothing found"
    assert MODULE in seen[4]
    shown = [turn.observations[0] for turn in play(task, tokenizer, 0.0, *calls).turns]
    assert "assert" in shown[0] and test in shown[3]


def test_a_share_is_a_share() -> None:
    with pytest.raises(InputError, match="agent.held_back is a share"):
        AgentConfig(held_back=1.5)
