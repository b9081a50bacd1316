"""GRPO with rollouts that run ahead of the learner by up to `max_staleness` versions.

The learner computes in a thread of its own, rollouts go on meanwhile, and new weights are published
beside the next step. Version v is the policy after v steps. A batch that the step from version v
trains on holds no token of a version below v - max_staleness (``rl/ahead.py``); each token keeps
its own version, and importance weights account for the rest (``rl/correction.py``).

Which groups are done first depends on the clock: unlike ``rl/train.py``, a run that is resumed, or
repeated, is not the same to the bit.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError
from model.config import Qwen3Config
from model.hosts import host_count
from model.preempt import noticed_by_any, unless_noticed
from model.qwen3 import Params
from rl.ahead import Ahead, Group, Publisher
from rl.learning import Learning, RLConfig
from rl.rollout import Episode
from rl.train import (
    check_tasks,
    episode_metrics,
    episode_seed,
    episodes_of_step,
    keep_episodes,
    stopped,
)
from sandbox.task import Task
from sft.tracking import Tracker
from sft.trajectory import Trajectory

# one episode with the newest weights; new weights, from a copy that nothing changes any more
Roll = Callable[[Episode], Coroutine[Any, Any, Trajectory]]
Publish = Callable[[Params, int], Coroutine[Any, Any, None]]


async def train_ahead(
    config: RLConfig,
    model: Qwen3Config,
    params: Params,
    tasks: Sequence[Task],
    run: Path,
    *,
    seed: int,
    temperature: float,
    roll: Roll,
    publish: Publish,
    mesh: Mesh | None = None,
    server_metrics: Callable[[], dict[str, float]] = dict,
    trackers: Sequence[Tracker] = (),
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """As ``train_rl``, with rollouts that run ahead.

    Raises also InputError on several hosts: their learners step together, and would wait for one
    another's slowest group.
    """
    if host_count() > 1:
        raise InputError("rl.max_staleness above 0 wants a learner of one host: set it to 0")
    check_tasks(tasks, config)
    learning = Learning(
        config,
        model,
        params,
        run,
        seed=seed,
        temperature=temperature,
        mesh=mesh,
        trackers=trackers,
    )
    start = learning.version

    def episodes(number: int, tries: int) -> list[Coroutine[Any, Any, Trajectory]]:
        step, group = divmod(number, config.tasks_per_step)
        planned = episodes_of_step(tasks, config, seed, step)[group]
        task, spare = planned[0].task, range(config.group_size, config.group_size + config.spare)
        planned += [Episode(task, episode_seed(seed, step, group, member)) for member in spare]
        if tries:  # another draw: the one before was thrown away
            planned = [Episode(task, episode_seed(e.seed, tries)) for e in planned]
        return [roll(episode) for episode in planned]

    ahead: Ahead[Trajectory] = Ahead(
        episodes,
        size=config.group_size,
        per_step=config.tasks_per_step,
        max_staleness=config.max_staleness,
        first=start,
        last=config.steps,
        oldest=lambda trajectory: trajectory.oldest_version,
    )

    async def renew(params: Params, version: int) -> None:
        await publish(params, version)
        ahead.published(version)

    publisher = Publisher(renew)
    try:
        publisher.offer(await asyncio.to_thread(_copied, learning.policy), start)
        for step in range(start, config.steps):
            began = time.monotonic()
            groups = await unless_noticed(publisher.unless_failed(ahead.take(step)))
            if groups is None:
                raise stopped(learning)
            waited = time.monotonic() - began
            flat = [group.done for group in groups]
            values = episode_metrics(flat) | _staleness(groups, step)
            values |= {"stale/dropped": float(ahead.dropped), "stale/ready": float(ahead.ready)}
            keep_episodes(run, step + 1, [t for group in flat for t in group])
            by_number: dict[int, Sequence[Trajectory]] = dict(enumerate(flat))
            values |= await asyncio.to_thread(learning.learn, by_number)
            if step + 1 < config.steps:
                publisher.offer(await asyncio.to_thread(_copied, learning.policy), step + 1)
            wall = time.monotonic() - began
            values |= {
                "time/rollout_s": waited,
                "time/learn_s": wall - waited,
                "time/learner_idle": waited / max(wall, 1e-9),
                **{f"time/{name}": value for name, value in server_metrics().items()},
            }
            learning.metrics.write("rl", step + 1, values)
            stop = noticed_by_any() and step + 1 < config.steps
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                learning.keep(values)
            on_step(step + 1, config.steps, values)
            if stop:
                raise stopped(learning, values)
    finally:
        await publisher.close()
        await ahead.close()
        learning.close()
    await publish(learning.policy, config.steps)
    return learning.policy


def _copied(params: Params) -> Params:
    """In the host's memory, where the next step does not overwrite it."""
    return jax.tree.map(lambda leaf: np.array(leaf), params)


def _staleness(groups: Sequence[Group[Trajectory]], step: int) -> dict[str, float]:
    """How many versions old the sampled tokens are: the mean, the largest, and shares by age."""
    ages: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.done:
            ages.update(step - v for v in trajectory.versions if v >= 0)
    total = sum(ages.values())
    values = {f"stale/age_{age}": count / total for age, count in sorted(ages.items())}
    mean = sum(age * count for age, count in ages.items()) / max(total, 1)
    return values | {"stale/mean": mean, "stale/max": float(max(ages, default=0))}
