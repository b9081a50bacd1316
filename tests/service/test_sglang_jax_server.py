"""The real sglang-jax, on a CPU: what it samples, and a new snapshot by drain, restart and probe.

REMEND_SGLANG_JAX_PYTHON is the interpreter of an environment with it (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from model.config import Qwen3Config
from model.decode import Engine
from model.qwen3 import Params, init
from model.tokenizer import Tokenizer
from rl.agent import Reply
from rl.inprocess import InProcessServer
from rl.policy_server import PolicyServer
from rl.probe import Prober
from rl.serving import SGLangConfig, open_server
from rl.snapshot import Snapshots

PYTHON = os.environ.get("REMEND_SGLANG_JAX_PYTHON", "")
pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="REMEND_SGLANG_JAX_PYTHON is not set"),
]
TOLERANCE = 1e-3  # nats, in the mean


async def talk(server: PolicyServer, seed: int, turns: int = 2) -> list[Reply]:
    session = await server.open(seed)
    try:
        return [await session.reply([10 + seed, 11 + n, 12], [""], 12) for n in range(turns)]
    finally:
        session.close()


def test_greedy_tokens_and_a_restart_for_each_snapshot(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,  # it pads heads to 128, and then fails on narrower ones
        tie_word_embeddings=False,
    )
    stop = (tokenizer.id("<|im_end|>"),)
    snapshots, prober = Snapshots(tmp_path / "snapshots", config, tokenizer), Prober(config)

    def greedy(params: Params) -> InProcessServer:
        return InProcessServer(Engine(params, config, slots=4, max_len=128), "rl", stop, 0.0)

    async def work() -> None:
        served = open_server(
            "sglang-jax",
            SGLangConfig(python=PYTHON, chip="cpu", start_s=400.0, tolerance=TOLERANCE),
            config,
            "rl",
            stop_ids=stop,
            temperature=0.0,
            lag=0,
            slots=4,
            max_tokens=512,
            logs=tmp_path,
            say=print,
        )
        launcher = served.fleet.replicas[0].launcher
        processes = []
        try:
            for version in range(2):
                params = init(config, version)
                snapshot = snapshots.write(params, version)
                await served.publish(snapshot, prober(params, version))
                processes.append(launcher._process.pid)  # type: ignore[union-attr]
                figures = served.metrics()
                assert figures["server/serving"] == 1 and figures["probe/mean"] <= TOLERANCE
                own = greedy(params)
                for seed in range(3):
                    theirs, ours = await talk(served, seed), await talk(own, seed)
                    assert [r.ids for r in theirs] == [r.ids for r in ours]
                    assert {v for r in theirs for v in r.versions} == {version}
            assert processes[0] != processes[1]
        finally:
            await served.close()

    asyncio.run(work())
