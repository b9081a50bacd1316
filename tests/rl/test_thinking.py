"""A token budget for thinking, over every kind of policy server; thinking is never obeyed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from configs.errors import InputError
from model.decode import Engine
from model.share import share_of
from model.tokenizer import Tokenizer
from rl.agent import AgentConfig, Reply, ScriptedSession, Session, _converse, _sample
from rl.experience import AdvantageConfig, Scores, Shape, prepare
from rl.inprocess import InProcessServer
from rl.loss import LossConfig
from sandbox.agent_tools import Observation, ToolCall
from sft.chat import Renderer
from sft.teacher import RUN, SUBMIT, VIEW
from sft.trajectory import ENVIRONMENT, FORCED, POLICY, Trajectory, Turn
from tests.rl.fake_sglang import FakeSGLang, all_logprobs
from tests.rl.test_sglang import STOP, TEMPERATURE, World, serving

BUDGET, ROOM = 5, 12  # of thinking, and behind what ends it
ENOUGH = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)


def record() -> Trajectory:
    return Trajectory("t", "p", "o", "train", "rl", 0, -1, "")


class Written:
    """A policy that writes these ids, as many as it may; what it was given is in `given`."""

    def __init__(self, *turns: list[int]) -> None:
        self._turns, self.given = iter(turns), list[tuple[list[int], int]]()

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        self.given.append((list(ids), max_new))
        found = next(self._turns)
        return Reply(found[:max_new], [-1.0] * len(found[:max_new]), len(found) <= max_new)

    def close(self) -> None: ...


def turn(render: Renderer, session: Session, budget: int, thinking: int = BUDGET) -> Trajectory:
    found = record()
    config = AgentConfig(max_new_tokens=10_000, thinking=True, thinking_budget=thinking)
    asyncio.run(_sample(found, session, [1], ["x"], budget, render, config))
    return found


def by(found: Trajectory, author: int) -> list[int]:
    return [i for i, a in zip(found.ids, found.author, strict=True) if a == author]


def test_thinking_that_has_used_up_its_budget_is_ended(tokenizer: Tokenizer) -> None:
    render = Renderer(tokenizer, thinking=True)
    thought = tokenizer.encode("<think>\nlong long thoughts", special=True)
    rest = render.reply([RUN])
    session = Written(thought, rest)
    found = turn(render, session, 10_000)
    assert tokenizer.decode(by(found, FORCED)) == ENOUGH == tokenizer.decode(render.enough())
    assert found.ids == thought[:BUDGET] + render.enough() + rest
    assert session.given[1] == (render.enough(), 10_000 - BUDGET - len(render.enough()))
    assert render.answer(found.ids) == tokenizer.encode("\n\n", special=True) + rest
    # one turn, in which the policy's own tokens alone have loss
    assert set(found.turn_of_ids()) == {0} and found.versions == [-1] * len(found.ids)
    found.reward, other = 1.0, turn(render, Written([3, 4]), 100)
    found.turns, other.turns = [Turn("", [], [])], [Turn("", [], [])]
    found.ids, found.author = [9, *found.ids], [ENVIRONMENT, *found.author]
    found.logprobs = [0.0, *found.logprobs]
    (rows,), _ = prepare(
        [[found, other]],
        AdvantageConfig(),
        LossConfig(),
        Shape(256, 256, 2),
        share_of(None),
        Scores(),
        scale=True,
        credit=0.0,
        weight_cap=0.0,
    )
    used = rows.weight[0] > 0
    assert rows.target[0][used].tolist() == by(found, POLICY) + by(other, POLICY)[1:]
    assert set(rows.old_logprob[0][used]) == {-1.0}


def test_a_turn_that_does_not_think_goes_on(tokenizer: Tokenizer) -> None:
    """With the thinking closed, or none, nothing is put in; nor where a turn has ended, or where
    the words would leave no room."""
    render = Renderer(tokenizer, thinking=True)
    closed = tokenizer.encode("<think>\n</think>\n\nso: ", special=True)
    for begun in (closed, tokenizer.encode("plain words, many of them", special=True)):
        session = Written(begun[:BUDGET] + [7], [8, 9])
        found = turn(render, session, 50)
        assert by(found, POLICY) == found.ids == [*begun[:BUDGET], 8, 9]
        assert session.given[1] == ([], 45)
    thought = tokenizer.encode("<think>\nlong long thoughts", special=True)
    assert turn(render, Written(thought[:2]), 50).ids == thought[:2]
    assert turn(render, Written(thought), BUDGET + len(render.enough())).ids == thought[:BUDGET]
    assert turn(render, Written(thought), 3).ids == thought[:3]


def test_a_scripted_policy_is_cut_and_goes_on(tokenizer: Tokenizer) -> None:
    render = Renderer(tokenizer, thinking=True)
    calls = iter([[VIEW, RUN], [SUBMIT]])
    session = ScriptedSession(lambda texts: next(calls), render)
    assert turn(render, session, 500).ids == render.reply([VIEW, RUN])
    assert turn(render, session, 500).ids == render.reply([SUBMIT])


@pytest.mark.parametrize("thinking", [True, False])
def test_calls_are_carried_out_behind_the_thinking_alone(
    tokenizer: Tokenizer, thinking: bool
) -> None:
    render = Renderer(tokenizer, thinking=thinking)
    called: list[ToolCall] = []

    class Box:
        async def call(self, call: ToolCall) -> Observation:
            called.append(call)
            return Observation("seen", done=call == SUBMIT)

    view = tokenizer.decode(render.reply([VIEW])[:-1])
    thought = tokenizer.encode(f"<think>\nperhaps {view}?\n</think>\n\n", special=True)
    cut = tokenizer.encode(f"<think>\n{view} and", special=True)
    session = Written(thought + render.reply([RUN]), cut, render.reply([SUBMIT]))
    config = AgentConfig(max_tokens=9999, max_new_tokens=len(cut) + 200, thinking=thinking)
    found = record()
    asyncio.run(_converse(found, session, Box(), render, config))  # type: ignore[arg-type]
    assert called == ([RUN, SUBMIT] if thinking else [VIEW, RUN, VIEW, SUBMIT])
    if thinking:
        assert found.turns[1].observations == ["error: no complete tool call"]


def test_a_budget_is_of_a_turn_that_thinks() -> None:
    for wrong in ({"thinking_budget": 9}, {"thinking": True, "thinking_budget": 96}):
        with pytest.raises(InputError, match="agent.thinking_budget"):
            AgentConfig(**wrong)


# -- over real servers: what is sampled continues the very ids before it, forced ones too


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> World:
    return World(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    return Engine(world.params[0], world.config, slots=2, max_len=384)


@pytest.fixture
def fake(world: World) -> Iterator[FakeSGLang]:
    found = FakeSGLang(world.config).start(world.snapshots[0].folder, "default")
    yield found
    found.kill()


class Thinks(Renderer):
    """Where the policy, which is random, would not."""

    def thinks(self, ids: Sequence[int]) -> bool:
        return True


@pytest.mark.parametrize("kind", ["inprocess", "sglang"])
@pytest.mark.parametrize("forced", [True, pytest.param(False, marks=pytest.mark.service)])
def test_over_a_server(
    world: World,
    engine: Engine,
    fake: FakeSGLang,
    tokenizer: Tokenizer,
    kind: str,
    forced: bool,
) -> None:
    render = (Thinks if forced else Renderer)(tokenizer, thinking=True)
    ends = render.enough() if forced else []
    budget = BUDGET + len(ends) + ROOM
    config = AgentConfig(max_new_tokens=budget, thinking=True, thinking_budget=BUDGET)

    async def two_turns(session: Session) -> Trajectory:
        found = record()
        for _ in range(2):
            new = [10, 11, 12]
            found.add(new, ENVIRONMENT)
            await _sample(found, session, new, ["x"], budget, render, config)
        session.close()
        return found

    async def go() -> list[Trajectory]:
        if kind == "inprocess":
            server = InProcessServer(engine, "rl", (STOP,), TEMPERATURE)
            return [await two_turns(await server.open(seed)) for seed in range(2)]
        async with serving(world, [fake]) as sglang:
            return [await two_turns(await sglang.open(seed)) for seed in range(2)]

    done = asyncio.run(go())
    for found in done:
        table = all_logprobs(world.config, world.params[0], found.ids, TEMPERATURE)
        for at, author in enumerate(found.author):
            if author == POLICY:
                want = table[at - 1, found.ids[at]]
                assert found.logprobs[at] == pytest.approx(want, abs=1e-4)
    assert any(by(found, FORCED) == ends * 2 for found in done)
    assert max(len(by(found, POLICY)) for found in done) <= 2 * (BUDGET + ROOM)
    assert np.mean([len(by(found, POLICY)) for found in done]) > BUDGET
