"""Whole episodes on real tasks in real sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import NoReturn

import pytest

from configs.errors import InputError
from model.tokenizer import Tokenizer
from rl.agent import (
    AgentConfig,
    NoopPolicy,
    Policy,
    Reply,
    ScriptedSession,
    Session,
    TeacherPolicy,
)
from rl.rollout import TRIES, Episode, run_episodes
from sandbox.agent_tools import ToolCall
from sandbox.agreement import agreement
from sandbox.base import SandboxBroken, Tree
from sandbox.environments import SIMPLIFIED, Setting
from sandbox.leased import LeasedSandbox
from sandbox.local import LocalPool
from sandbox.task import Task, load_tasks
from sandbox.verdict import judge
from sft.chat import Renderer
from sft.teacher import RUN, SUBMIT
from sft.trajectory import DROPPED, ENVIRONMENT, POLICY, Trajectory

pytestmark = pytest.mark.network
CONFIG = AgentConfig(max_turns=7, max_tokens=4096, max_new_tokens=512)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """A few tasks of one small package."""
    try:
        found = [t for t in load_tasks(split="heldout") if t.package == "inflection"]
    except InputError as error:
        pytest.skip(f"packages cannot be fetched: {error}")
    return found[:6]


def run(
    tasks: Sequence[Task],
    policy: Policy,
    render: Renderer,
    seed: int,
    setting: Setting = SIMPLIFIED,
    pool: LocalPool | None = None,
) -> list[Trajectory]:
    async def go() -> list[Trajectory]:
        async with pool or LocalPool(2) as sandboxes:
            episodes = [Episode(task, seed) for task in tasks]
            return await run_episodes(
                episodes, policy, sandboxes, render, CONFIG, concurrency=3, setting=setting
            )

    return asyncio.run(go())


def test_controls_and_teacher(tasks: list[Task], tokenizer: Tokenizer) -> None:
    render = Renderer(tokenizer)
    assert not any(t.success for t in run(tasks, NoopPolicy(render), render, 0))
    taught = [t for seed in range(3) for t in run(tasks, TeacherPolicy(render), render, seed)]
    assert any(t.success for t in taught)
    for t in taught:
        assert t.reward == float(t.success) == float(t.verdict["verdict"] == "pass")
        assert bool(t.patch) or not t.success

    async def oracle() -> list[str]:
        async with LocalPool(2) as pool:
            return [(await judge(task, task.gold_patch, pool)).verdict for task in tasks]

    assert set(asyncio.run(oracle())) == {"pass"}


def test_the_teacher_acts_in_both_environments(tasks: list[Task], tokenizer: Tokenizer) -> None:
    """The same edits in the same order: what differs is how many tests it is told of, and that a
    try may be one that only the larger suite finds wanting."""
    render = Renderer(tokenizer)
    policy = TeacherPolicy(render)
    plain = run(tasks[:2], policy, render, 1)
    both = Setting("full", judge_both=True, shell_without_isolation=True)
    whole = run(tasks[:2], policy, render, 1, both)
    for t, w in zip(plain, whole, strict=True):
        assert (t.environment, w.environment) == ("simplified", "full")
        assert t.other_verdict == {} and list(t.verdicts) == ["simplified"]
        assert set(w.verdicts) == {"simplified", "full"} and w.reward == float(w.success)
        assert w.verdict["judged_in"] == "full" and w.verdict["build"] in ("passed", "")
        assert w.prompt == t.prompt
        edits = [
            [call for turn in e.turns for call in turn.calls if call["name"] == "edit"]
            for e in (t, w)
        ]
        shorter = min(map(len, edits))
        assert edits[0][:shorter] == edits[1][:shorter]
    assert any(t.success for t in whole)
    table = agreement(t.verdicts for t in whole)
    assert table["n"] == len(whole) and table["full_only"] == 0  # it is judged by more


def test_a_shell_is_offered_in_full_alone_and_only_where_it_is_isolated(
    tasks: list[Task], tokenizer: Tokenizer
) -> None:
    render = Renderer(tokenizer)

    class Sheller(TeacherPolicy):
        async def open(self, seed: int) -> Session:
            replies = iter([[ToolCall("bash", {"command": "echo $((6 * 7))"})], [SUBMIT]])
            return ScriptedSession(lambda texts: next(replies), render)

    def told(setting: Setting, pool: LocalPool) -> str:
        (t,) = run(tasks[:1], Sheller(render), render, 0, setting, pool)
        return t.turns[0].observations[0]

    assert told(SIMPLIFIED, LocalPool(1)).startswith("error: no tool 'bash'")
    plain = LocalPool(1, backend="plain", warn=lambda text: None)
    with pytest.raises(ExceptionGroup) as raised:
        told(Setting("full"), plain)
    assert raised.group_contains(InputError, match="shell_without_isolation")
    plain = LocalPool(1, backend="plain", warn=lambda text: None)
    assert told(Setting("full", shell_without_isolation=True), plain) == "42"


def test_hidden_tests_are_not_run_by_the_agent_and_decide(
    tasks: list[Task], tokenizer: Tokenizer
) -> None:
    """With the bug there, what it can run passes, so the teacher submits at once."""
    render = Renderer(tokenizer)
    (t,) = run(tasks[:1], TeacherPolicy(render), render, 0, Setting(hide_tests="failing"))
    told = f"all {len(tasks[0].pass_to_pass)} tests pass"
    assert t.turns[0].observations[0] == told and t.verdict["verdict"] == "fail"
    assert set(t.verdict["fail_to_pass"]) == set(tasks[0].fail_to_pass)


def test_an_episode_is_its_ids(tasks: list[Task], tokenizer: Tokenizer) -> None:
    """The text of all ids is the conversation, and the policy's ids are the policy's turns."""
    render = Renderer(tokenizer)
    for t in run(tasks[:3], TeacherPolicy(render), render, 1):
        assert len(t.ids) == len(t.author) == len(t.logprobs)
        written = [i for i, author in zip(t.ids, t.author, strict=True) if author == POLICY]
        assert tokenizer.decode(written) == "".join(turn.text for turn in t.turns)
        text = tokenizer.decode(t.ids)
        assert text.startswith("<|im_start|>system") and t.prompt in text
        assert all(o in text for turn in t.turns[:-1] for o in turn.observations)
        assert t.author[0] == ENVIRONMENT and t.author[-1] == POLICY


def test_the_same_seed_gives_the_same_episode(tasks: list[Task], tokenizer: Tokenizer) -> None:
    render = Renderer(tokenizer)
    first = run(tasks[:2], TeacherPolicy(render), render, 5)
    again = run(tasks[:2], TeacherPolicy(render), render, 5)
    assert [t.ids for t in first] == [t.ids for t in again]


def test_a_turn_ends_when_the_tests_pass(tasks: list[Task], tokenizer: Tokenizer) -> None:
    """Tries planned behind the right one are dropped, rather than undoing it."""
    render = Renderer(tokenizer)
    taught = [t for seed in range(3) for t in run(tasks, TeacherPolicy(render), render, seed)]
    solved = next(t for t in taught if t.success and t.stop == "submit")
    repair = solved.turns[-2].calls[0]["arguments"] | {"undo": True}
    spoilt = {"old": repair["old"], "new": "(", "undo": True}
    calls = [ToolCall("edit", spoilt), RUN, ToolCall("edit", repair), RUN]

    class Planner(TeacherPolicy):
        async def open(self, seed: int) -> Session:
            replies = iter([[*calls, ToolCall("edit", spoilt), RUN], [SUBMIT]])
            return ScriptedSession(lambda texts: next(replies), render)

    task = next(task for task in tasks if task.name == solved.task)
    (t,) = run([task], Planner(render), render, 0)
    assert t.success and len(t.turns) == 2
    assert [o.split()[0] for o in t.turns[0].observations][::2] == ["edited", "edited"]
    assert t.turns[0].observations[-1].endswith(" tests pass") and len(t.turns[0].calls) == 4
    assert t.turns[0].text.count('"run_tests"') == 3
    # what was not carried out carries no loss, all else that the policy wrote does
    written = {a: [i for i, b in zip(t.ids, t.author, strict=True) if a == b] for a in (1, 2)}
    assert written[DROPPED] == render.reply([*calls, *calls[:2]])[len(render.reply(calls)) - 1 :]
    assert written[POLICY] == render.reply(calls)[:-1] + render.reply([SUBMIT])


class _Babbler:
    """A policy that never says anything useful."""

    name = "babbler"

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    async def open(self, seed: int) -> _Babbler:
        return self

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        written = self._ids[:max_new]
        return Reply(written, [0.0] * len(written), ended=False)

    def close(self) -> None:
        pass


def test_nonsense_is_answered_to_the_last_turn(tasks: list[Task], tokenizer: Tokenizer) -> None:
    render = Renderer(tokenizer)
    for text in ("nonsense", "<tool_call>{", '<tool_call>{"name": "rm"}</tool_call>'):
        ids = tokenizer.encode(text, special=True)
        (t,) = run(tasks[:1], _Babbler(ids), render, 0)
        assert t.stop == "turns" and len(t.turns) == CONFIG.max_turns and not t.success
        assert all(turn.observations[0].startswith("error: ") for turn in t.turns)


class Breaking(LocalPool):
    """Sandboxes that break when `calls` are made of them, if they hold this task."""

    def __init__(self, bad: Task, calls: Sequence[str]) -> None:
        super().__init__(2)
        self._bad, self._calls = bad.tree().overlay, calls
        self.broke = 0

    @contextlib.asynccontextmanager
    async def lease(self, tree: Tree) -> AsyncIterator[LeasedSandbox]:
        async with super().lease(tree) as sandbox:
            if tree.overlay == self._bad:
                for call in self._calls:
                    setattr(sandbox, call, self._break)
            yield sandbox

    async def _break(self, *_: object, **__: object) -> NoReturn:
        self.broke += 1
        raise SandboxBroken("it went away")


def test_what_breaks_its_sandbox_every_time_earns_nothing(
    tasks: list[Task], tokenizer: Tokenizer
) -> None:
    """The others end as ever; but a sandbox that breaks without an agent is the harness's."""
    render = Renderer(tokenizer)
    policy = TeacherPolicy(render)

    async def go(*calls: str) -> tuple[list[Trajectory], int]:
        async with Breaking(tasks[0], calls) as pool:
            episodes = [Episode(task, 0) for task in tasks[:4]]
            found = await run_episodes(episodes, policy, pool, render, CONFIG, concurrency=2)
            return found, pool.broke

    found, broke = asyncio.run(go("read", "write"))
    assert broke == TRIES
    assert [t.verdict["verdict"] == "error" for t in found] == [True, False, False, False]
    assert list(found[0].verdict["flags"]) == ["sandbox:it went away"]
    assert (found[0].reward, found[0].stop) == (0.0, "sandbox") and found[0].ids
    assert [t.ids for t in found[1:]] == [t.ids for t in run(tasks[1:4], policy, render, 0)]
    with pytest.raises(ExceptionGroup) as raised:  # the task's tests cannot be run without it
        asyncio.run(go("read", "write", "run_tests"))
    assert raised.group_contains(SandboxBroken, match="it went away")
