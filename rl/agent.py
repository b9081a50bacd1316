"""One episode: a policy repairs one task in one sandbox, and the verdict is computed elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.errors import InputError
from sandbox.agent_tools import Observation, ToolBox, ToolCall
from sandbox.base import SandboxBroken, SandboxPool
from sandbox.checks import checks_of
from sandbox.environments import SIMPLIFIED, Environment, Setting, other
from sandbox.hidden import hidden_tests, visible, without_tests
from sandbox.task import Task
from sandbox.verdict import broken_sandbox, judge
from sft.chat import Malformed, Renderer, parse_calls
from sft.teacher import SUBMIT, SearchTeacher
from sft.trajectory import DROPPED, ENVIRONMENT, FORCED, POLICY, Trajectory, Turn


@dataclass(frozen=True)
class AgentConfig:
    """Limits of one episode, the same for teacher, student and every evaluation.

    Attributes:
      max_turns: policy turns. A turn may hold several tool calls, carried out in order until
        tests pass: a policy may plan several tries at once.
      max_tokens: whole episode, prompt included; also the length of the KV cache.
      max_new_tokens: sampled in one turn.
      temperature: of sampling, in rollouts and evaluations alike.
      thinking: Qwen3's thinking mode. What is written inside `<think>` is no tool call.
      thinking_budget: tokens of one turn after which a `<think>` that is still open is closed, with
        the words that Qwen3 has for it; 0: none. Counted within `max_new_tokens`.
      declare_tools: put the tools' JSON schemas into the system turn.
    """

    max_turns: int = 8
    max_tokens: int = 1024
    max_new_tokens: int = 96
    temperature: float = 1.0
    thinking: bool = False
    thinking_budget: int = 0
    declare_tools: bool = False

    def __post_init__(self) -> None:
        if self.thinking_budget and not self.thinking:
            raise InputError("agent.thinking_budget goes with agent.thinking: true")
        if self.thinking_budget and not 0 < self.thinking_budget < self.max_new_tokens:
            raise InputError(
                f"agent.thinking_budget must lie in 1..{self.max_new_tokens - 1}, below "
                "max_new_tokens, which is of the whole turn"
            )


@dataclass(frozen=True)
class Reply:
    """One sampled turn: token ids with their sampling log-probabilities; `ended` by its own end
    token, rather than by the token limit. `versions`: of the weights that sampled each token; empty
    for a policy without weights."""

    ids: list[int]
    logprobs: list[float]
    ended: bool
    versions: list[int] = field(default_factory=list)

    @property
    def weight_version(self) -> int:
        """Of the weights at the last token; -1 for a policy without weights."""
        return self.versions[-1] if self.versions else -1


class GivenUp(Exception):
    """A policy cannot go on with this episode, which ends as it stands. The message, one word, is
    why."""


class Session(Protocol):
    """A policy inside one episode."""

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        """The next turn, given what is new: the ids, and the same as texts. Where nothing is, or
        ids without texts, the turn before goes on, which had no end. May raise
        GivenUp."""
        ...

    def close(self) -> None: ...


class Policy(Protocol):
    """Something that can repair: a served model, or the teacher."""

    name: str

    async def open(self, seed: int) -> Session: ...


class TeacherPolicy:
    """The search teacher behind the protocol of a model."""

    name = "teacher"

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def open(self, seed: int) -> Session:
        return ScriptedSession(SearchTeacher(seed).act, self._renderer)


class NoopPolicy:
    """The control that submits at once: what it solves was never broken."""

    name = "noop"

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def open(self, seed: int) -> Session:
        return ScriptedSession(lambda texts: [SUBMIT], self._renderer)


class ScriptedSession:
    """A policy that writes calls rather than samples tokens."""

    def __init__(self, act: Callable[[Sequence[str]], list[ToolCall]], renderer: Renderer) -> None:
        self._act, self._renderer = act, renderer
        self._rest: list[int] = []

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        if texts:
            self._rest = self._renderer.reply(self._act(texts))
        # the same limit as a sampled turn
        written, self._rest = self._rest[:max_new], self._rest[max_new:]
        return Reply(written, [0.0] * len(written), ended=not self._rest)

    def close(self) -> None:
        pass


async def run_episode(
    task: Task,
    policy: Policy,
    pool: SandboxPool,
    renderer: Renderer,
    config: AgentConfig,
    seed: int,
    setting: Setting = SIMPLIFIED,
) -> Trajectory:
    """Run one episode in an environment and judge what it left behind. Policy mistakes end in an
    observation or a failing verdict; only harness trouble raises. A sandbox that breaks under the
    policy's calls ends it with the verdict "error": whose trouble that is, `rl.rollout` finds out.

    Raises InputError where the policy would have a shell without isolation, or as `checks_of` does.
    """
    began = time.monotonic()
    record = Trajectory(
        task=task.name,
        package=task.package,
        operator=task.operator,
        split=task.split,
        policy=policy.name,
        seed=seed,
        weight_version=-1,
        prompt=task.instruction,
        environment=setting.environment,
    )
    checks = await checks_of(task, pool, setting.environment)
    session = await policy.open(seed)
    try:
        tree = task.tree()
        if setting.hide_tests:
            hidden = hidden_tests(task, setting.hide_tests)
            tree = without_tests(tree, hidden)
            checks = visible(checks, tree, hidden)
        async with pool.lease(tree) as sandbox:
            setting.refuse_bare_shell(pool.backend)
            box = ToolBox(sandbox, checks, task.module, task.function, setting.environment)
            await _converse(record, session, box, renderer, config)
            record.patch = await sandbox.diff()
        verdict = await judge(task, record.patch, pool, environment=setting.environment)
    except SandboxBroken as error:
        if not record.turns:
            raise
        record.stop = "sandbox"
        verdict = broken_sandbox(task, error, pool.environment, setting.environment)
    finally:
        session.close()
    record.verdict = verdict.record()
    if setting.judge_both and verdict.verdict != "error":
        record.other_verdict = await _second(task, record.patch, pool, other(setting.environment))
    record.reward = float(verdict.verdict == "pass")
    record.seconds = round(time.monotonic() - began, 3)
    record.sandbox_s = round(record.sandbox_s + verdict.seconds, 3)
    return record


async def _second(
    task: Task, patch: str, pool: SandboxPool, environment: Environment
) -> dict[str, Any]:
    """The verdict of another environment; {} if it cannot judge this task."""
    try:
        return (await judge(task, patch, pool, environment=environment)).record()
    except InputError:
        return {}


async def _converse(
    record: Trajectory, session: Session, box: ToolBox, renderer: Renderer, config: AgentConfig
) -> None:
    """Alternate policy turns and observations until submit or a limit; fills `record`."""
    texts, ids = [record.prompt], renderer.prompt(record.prompt)
    for _ in range(config.max_turns):
        budget = min(config.max_new_tokens, config.max_tokens - len(record.ids) - len(ids))
        if budget <= 0:
            record.stop = "tokens"
            return
        record.add(ids, ENVIRONMENT)
        start = len(record.ids)
        try:
            ended = await _sample(record, session, ids, texts, budget, renderer, config)
        except GivenUp as error:
            record.stop = str(error)
            return
        written = record.ids[start:]
        said = renderer.answer(written)
        turn = Turn(renderer.tokenizer.decode(written), [], [])
        record.turns.append(turn)
        for call in parse_calls(renderer.tokenizer.decode(said)):
            if isinstance(call, Malformed):
                observation = Observation(f"error: {call.reason}")
            else:
                turn.calls.append({"name": call.name, "arguments": dict(call.arguments)})
                asked = time.monotonic()
                observation = await box.call(call)
                record.sandbox_s += time.monotonic() - asked
            turn.observations.append(observation.text)
            if observation.done:
                record.stop = "submit"
                return
            if observation.passed:
                # what else this turn holds was planned for tests that fail
                unused = _behind(said, len(turn.observations), renderer)
                record.author[len(record.ids) - unused :] = [DROPPED] * unused
                break
        texts = turn.observations
        ids = renderer.observation(texts, ended=ended)
    record.stop = "turns"


async def _sample(
    record: Trajectory,
    session: Session,
    ids: Sequence[int],
    texts: Sequence[str],
    budget: int,
    renderer: Renderer,
    config: AgentConfig,
) -> bool:
    """One turn of the policy into `record`; whether it ended it itself.

    Qwen's own recipe for a thinking budget: sample as many tokens; if the policy still thinks, put
    in what ends its thinking; go on with the rest of the turn's tokens.
    """
    first = min(config.thinking_budget or budget, budget)
    reply = await session.reply(ids, texts, first)
    _add(record, reply)
    if reply.ended or len(reply.ids) < first or first == budget:
        return reply.ended
    forced = renderer.enough() if renderer.thinks(reply.ids) else []
    left = budget - first - len(forced)
    if left <= 0:
        return False
    record.add(forced, FORCED)
    reply = await session.reply(forced, [], left)
    _add(record, reply)
    return reply.ended


def _add(record: Trajectory, reply: Reply) -> None:
    record.add(reply.ids, POLICY, reply.logprobs, reply.versions or None)
    record.weight_version = reply.weight_version


def _behind(ids: Sequence[int], calls: int, renderer: Renderer) -> int:
    """How many of a turn's ids lie behind its first `calls` calls, if there are more calls; 0 if
    there are not: ending the turn there was right."""
    opening, closing = (renderer.tokenizer.id(t) for t in ("<tool_call>", "</tool_call>"))
    ends = [i for i, token in enumerate(ids, 1) if token == closing]
    rest = ids[ends[calls - 1] :] if len(ends) >= calls else []
    return len(rest) if opening in rest else 0
