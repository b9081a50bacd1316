"""One side of `remend bench ahead`: a run, timed, and its final policy evaluated."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from configs.schema import load
from sandbox.base import Sandbox, SandboxPool, TestReport, Tree
from tools.simulate import Spread


class _WaitingSandbox:
    """A sandbox whose test runs take longer, without CPU."""

    def __init__(self, sandbox: Sandbox, wait: Spread, rng: random.Random) -> None:
        self._sandbox, self._wait, self._rng = sandbox, wait, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sandbox, name)

    async def run_tests(self, ids: Sequence[str], **options: Any) -> TestReport:
        report = await self._sandbox.run_tests(ids, **options)
        await asyncio.sleep(self._wait.draw(self._rng))
        return report


class WaitingPool:
    """A pool of those; the waits are drawn in the order in which test runs end."""

    def __init__(self, pool: SandboxPool, wait: Spread, seed: int) -> None:
        self._pool, self._wait, self._rng = pool, wait, random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    @asynccontextmanager
    async def lease(self, tree: Tree) -> AsyncIterator[Any]:
        async with self._pool.lease(tree) as sandbox:
            yield _WaitingSandbox(sandbox, self._wait, self._rng)


async def run(order: dict[str, Any]) -> dict[str, Any]:
    """Train from the shipped policy, without SFT, then evaluate without waits."""
    from model.hf import load_hf
    from rl.evaluate import per_task
    from tools.pipeline import Pipeline
    from tools.reinforce import reinforce
    from tools.run_config import RunConfig

    config = load(RunConfig, Path(order["config"]), order["overrides"])
    async with Pipeline(config, Path(order["run"]), order["seed"]) as pipeline:
        real: Any = pipeline.pool
        if order["wait"]:
            pipeline.pool = WaitingPool(real, Spread(*order["wait"]), order["seed"])
        ends: list[float] = []

        def note(done: int, of: int, text: str = "") -> None:
            ends.append(time.monotonic())
            print(f"  step {done} of {of}: {text}", file=sys.stderr, flush=True)

        start = load_hf(pipeline.start.folder).params
        final = await reinforce(pipeline, start, pipeline.train_tasks, note)
        pipeline.pool = real
        evaluated = await pipeline.evaluate("final", final)
    first, last = order["timed"]  # steps, as a slice has them
    return {
        "episodes": (last - first) * config.rl.tasks_per_step * config.rl.group_size,
        "seconds": ends[last - 1] - ends[first - 1],
        "learner_idle": _idle(Path(order["run"]), slice(first, last)),
        "success": per_task(evaluated),
    }


def _idle(run: Path, timed: slice) -> float:
    """Share of the timed steps in which the learner waited for episodes."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "time/rollout_s" in row][timed]
    waited = sum(row["time/rollout_s"] for row in steps)
    return float(waited / max(waited + sum(row["time/learn_s"] for row in steps), 1e-9))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.loads(sys.argv[1])))))
