"""`remend simulate CONFIG`: size an asynchronous run from latencies, before renting it.

Runs the scheduler of the real thing (``rl/ahead.py``) under a clock that jumps, with a learner,
servers and sandboxes that do nothing but take time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError

_P95 = 1.6449  # of the normal distribution, in standard deviations


@dataclass(frozen=True)
class Spread:
    """A log-normal quantity by its median and its 95th percentile, cut off at `most`."""

    median: float
    p95: float
    most: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.median <= self.p95 <= self.most:
            raise ValueError("wants 0 < median <= p95 <= most")

    def draw(self, rng: random.Random) -> float:
        sigma = math.log(self.p95 / self.median) / _P95
        return min(self.median * math.exp(sigma * rng.gauss(0, 1)), self.most)


@dataclass(frozen=True)
class Episodes:
    """What an episode does. `turns` and `turn_tokens` are rounded; `tool_s` is a turn's time in the
    sandbox, `verdict_s` that of the verdict behind the last one."""

    turns: Spread
    turn_tokens: Spread
    tool_s: Spread
    verdict_s: Spread


@dataclass(frozen=True)
class SimulateConfig:
    """Attributes:
    max_staleness: each is simulated in turn.
    steps: of the learner; the first `warmup` are not counted.
    learn_s: one step of the learner. copy_s: to copy its weights to its hosts' memory; snapshot_s:
      to write them from there, beside the next step.
    load_s: servers stand still while they load new weights.
    replicas, requests: servers, and requests of each at one time; more wait.
    request_tokens_per_s: of a request that is alone; replica_tokens_per_s: of a server that is
      full, over all its requests.
    sandboxes: episodes at one time; each holds one to its end.
    """

    episodes: Episodes
    max_staleness: tuple[int, ...] = (0, 1, 2, 4)
    steps: int = 16
    warmup: int = 4
    tasks_per_step: int = 32
    group_size: int = 16
    spare: int = 0
    learn_s: float = 60.0
    copy_s: float = 0.0
    snapshot_s: float = 10.0
    load_s: float = 5.0
    replicas: int = 8
    requests: int = 64
    request_tokens_per_s: float = 40.0
    replica_tokens_per_s: float = 1000.0
    sandboxes: int = 512
    seed: int = 0


@dataclass
class _World:
    """Servers and sandboxes, and who waits for them."""

    config: SimulateConfig
    rng: random.Random
    measured: Sequence[Sequence[tuple[float, float]]]  # episodes: turns of (tokens, tool seconds)
    version: int = 0
    sampled: float = 0.0
    busy: float = 0.0  # replica-seconds
    held: float = 0.0  # sandbox-seconds
    running: list[int] = field(default_factory=list)
    since: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running, self.since = [0] * self.config.replicas, [0.0] * self.config.replicas
        self.places = asyncio.Semaphore(self.config.replicas * self.config.requests)
        self.sandboxes = asyncio.Semaphore(self.config.sandboxes)
        self.going = asyncio.Event()
        self.going.set()

    async def episode(self) -> int:
        """Its oldest version."""
        clock = asyncio.get_running_loop().time
        async with self.sandboxes:
            began, oldest = clock(), self.version
            try:
                for tokens, tool_s in self._plan():
                    await self._sample(tokens)
                    await asyncio.sleep(tool_s)
                await asyncio.sleep(self.config.episodes.verdict_s.draw(self.rng))
            finally:
                self.held += clock() - began
        return oldest

    def _plan(self) -> Sequence[tuple[float, float]]:
        if self.measured:
            return self.rng.choice(self.measured)
        shape = self.config.episodes
        turns = max(1, round(shape.turns.draw(self.rng)))
        return [
            (max(1.0, shape.turn_tokens.draw(self.rng)), shape.tool_s.draw(self.rng))
            for _ in range(turns)
        ]

    async def _sample(self, tokens: float) -> None:
        clock, config = asyncio.get_running_loop().time, self.config
        async with self.places:
            at = min(range(config.replicas), key=self.running.__getitem__)
            if not self.running[at]:
                self.since[at] = clock()
            self.running[at] += 1
            try:
                if not self.going.is_set():
                    await self.going.wait()
                # at the speed of its beginning: turns are short beside the changes of load
                share = config.replica_tokens_per_s / self.running[at]
                await asyncio.sleep(tokens / min(config.request_tokens_per_s, share))
                self.sampled += tokens
            finally:
                self.running[at] -= 1
                if not self.running[at]:
                    self.busy += clock() - self.since[at]


async def _simulate(
    config: SimulateConfig, lag: int, measured: Sequence[Sequence[tuple[float, float]]]
) -> dict[str, Any]:
    from rl.ahead import Ahead, Publisher

    clock = asyncio.get_running_loop().time
    world = _World(config, random.Random(config.seed), measured)

    def episodes(number: int, tries: int) -> list[Coroutine[Any, Any, int]]:
        return [world.episode() for _ in range(config.group_size + config.spare)]

    ahead: Ahead[int] = Ahead(
        episodes,
        size=config.group_size,
        per_step=config.tasks_per_step,
        max_staleness=lag,
        first=0,
        last=config.steps + lag + 1,  # as in a longer run: what comes next is under way at the end
        oldest=lambda version: version,
    )

    async def write(_: Any, version: int) -> None:
        await asyncio.sleep(config.snapshot_s if version else 0)

    async def serve(_: Any, version: int) -> None:
        if version:
            world.going.clear()
            await asyncio.sleep(config.load_s)
            world.going.set()
        world.version = version
        ahead.published(version)

    publisher = Publisher(write, serve)
    publisher.offer(None, 0)
    waited, ages, began, at = 0.0, Counter[int](), 0.0, (0.0, 0.0, 0.0)
    for step in range(config.steps):
        if step == config.warmup:
            began, waited, at = clock(), 0.0, (world.sampled, world.busy, world.held)
            ages.clear()
        asked = clock()
        groups = await publisher.unless_failed(ahead.take(step))
        waited += clock() - asked
        ages.update(step - version for group in groups for version in group.done)
        await asyncio.sleep(config.learn_s)
        if step + 1 < config.steps and not publisher.full:
            await asyncio.sleep(config.copy_s)
            publisher.offer(None, step + 1)
    wall = clock() - began
    counted = config.steps - config.warmup
    for replica, running in enumerate(world.running):
        world.busy += clock() - world.since[replica] if running else 0.0
    sampled, busy, held = (
        now - then for now, then in zip((world.sampled, world.busy, world.held), at, strict=True)
    )
    await publisher.close()
    await ahead.close()
    total = sum(ages.values())
    return {
        "max_staleness": lag,
        "step_s": wall / counted,
        "episodes_per_h": 3600 * counted * config.tasks_per_step * config.group_size / wall,
        "learner_idle": waited / wall,
        "server_idle": max(0.0, 1 - busy / (wall * config.replicas)),
        "sandbox_idle": max(0.0, 1 - held / (wall * config.sandboxes)),
        "tokens_per_s": sampled / wall,
        "staleness": {str(age): count / total for age, count in sorted(ages.items())},
        "groups_dropped": ahead.dropped,
    }


def simulate(
    config: SimulateConfig, measured: Sequence[Sequence[tuple[float, float]]] = ()
) -> list[dict[str, Any]]:
    """One row for each staleness. `measured`: episodes to replay in place of `config.episodes`."""
    from rl.clock import run_simulated

    if config.steps <= config.warmup:
        raise InputError("steps must be more than warmup")
    return [run_simulated(_simulate(config, lag, measured)) for lag in config.max_staleness]


def measure(run: Path, tokens_per_s: float) -> list[list[tuple[float, float]]]:
    """The turns of a run's RL episodes as (tokens, seconds in the sandbox): what an episode took
    beyond sampling at `tokens_per_s` is shared out evenly among its turns and verdict."""
    from sft.trajectory import WRITTEN, load

    found = []
    for path in sorted((run / "trajectories").glob("rl-*.jsonl")):
        for trajectory in load(path):
            tokens: Counter[int] = Counter(n for n in trajectory.turn_of_ids() if n >= 0)
            sampled = sum(author in WRITTEN for author in trajectory.author)
            rest = max(0.0, trajectory.seconds - sampled / tokens_per_s)
            tool_s = rest / (len(tokens) + 1)
            found.append([(float(count), tool_s) for _, count in sorted(tokens.items())])
    if not found:
        raise InputError(f"{run} has no RL episodes to measure")
    return found


def main(argv: list[str]) -> int:
    """Run `remend simulate`."""
    parser = argparse.ArgumentParser(prog="remend simulate", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run", type=Path, help="replay the episodes of this run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_intermixed_args(argv)

    from configs.schema import load, to_dict

    config = load(SimulateConfig, args.config, args.overrides)
    measured = measure(args.run, config.request_tokens_per_s) if args.run else []
    rows = simulate(config, measured)
    if args.json:
        print(json.dumps({"rows": rows, "config": to_dict(config)}))
        return 0
    from rich.console import Console
    from rich.table import Table

    names = ("step_s", "episodes_per_h", "learner_idle", "server_idle", "sandbox_idle")
    table = Table(title=f"{args.config.stem}, simulated")
    for name in ("max_staleness", *names, "staleness"):
        table.add_column(name, justify="right")
    for row in rows:
        ages = ", ".join(f"{age}: {share:.0%}" for age, share in row["staleness"].items())
        cells = [f"{row[n]:.1%}" if "idle" in n else f"{row[n]:.0f}" for n in names]
        table.add_row(str(row["max_staleness"]), *cells, ages)
    Console().print(table)
    return 0
