"""The in-process server gathers episodes for a step, and waits for none for long."""

from __future__ import annotations

import asyncio

import pytest

from model.config import Qwen3Config
from model.decode import Engine
from model.qwen3 import init
from rl import inprocess
from rl.inprocess import InProcessServer

MODEL = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """It counts its decode dispatches in `engine.dispatches`."""
    engine = Engine(init(MODEL, 0), MODEL, slots=4, max_len=32, decode_tokens=8)
    engine.dispatches = 0  # type: ignore[attr-defined]
    run = engine._run_decode

    def counted(ready: list[int]):
        engine.dispatches += 1  # type: ignore[attr-defined]
        return run(ready)

    monkeypatch.setattr(engine, "_run_decode", counted)
    return engine


def test_a_step_waits_for_an_episode_that_is_at_its_tools(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess, "GATHER_S", 30.0)
    server = InProcessServer(engine, "rl", (63,), 0.0)

    async def work() -> None:
        first, second = await server.open(1), await server.open(2)
        answers = asyncio.gather(first.reply([1, 2, 3], [""], 8), _later(second))
        await answers
        # one has closed: nobody is left to wait for
        first.close()
        await second.reply([4], [""], 8)
        second.close()

    async def _later(session: inprocess.ServerSession) -> None:
        await asyncio.sleep(0.05)
        await session.reply([1, 2, 4], [""], 8)

    asyncio.run(asyncio.wait_for(work(), 25))
    assert engine.dispatches == 2  # type: ignore[attr-defined]


def test_a_step_does_not_wait_for_long(engine: Engine) -> None:
    server = InProcessServer(engine, "rl", (63,), 0.0)

    async def work() -> int:
        sessions = [await server.open(seed) for seed in range(3)]  # two of them never come
        reply = await sessions[0].reply([1, 2, 3], [""], 8)
        return len(reply.ids)

    assert 0 < asyncio.run(asyncio.wait_for(work(), 25)) <= 8
