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

from jax.sharding import Mesh

from model.config import Qwen3Config
from model.hosts import agree, barrier, host_index
from model.preempt import noticed_by_any, unless_noticed
from model.qwen3 import Params
from rl.ahead import Ahead, Group, Publisher
from rl.learning import Learning, RLConfig
from rl.rollout import Episode
from rl.train import (
    check_tasks,
    cut,
    episode_metrics,
    episode_seed,
    episodes_file,
    episodes_of_step,
    groups_of,
    keep_episodes,
    stopped,
)
from sandbox.task import Task
from sft.tracking import Tracker
from sft.trajectory import Trajectory, load

# one episode with the newest weights; a copy of a version that nothing changes any more, its
# snapshot, and having that served
Roll = Callable[[Episode], Coroutine[Any, Any, Trajectory]]
Copy = Callable[[Params, int], Any]
Write = Callable[[Any, int], Any]
Serve = Callable[[Any], Coroutine[Any, Any, None]]


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
    copy: Copy,
    write: Write,
    serve: Serve,
    mesh: Mesh | None = None,
    server_metrics: Callable[[], dict[str, float]] = dict,
    trackers: Sequence[Tracker] = (),
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """As ``train_rl``, with rollouts that run ahead.

    All hosts call `copy(params, version)` between two steps, and `write(copied, version)` in a
    thread beside the next one; `serve`, of what that made, and `roll` the first host alone.
    """
    first = host_index() == 0
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

    async def written(copied: Any, version: int) -> Any:
        return await asyncio.to_thread(write, copied, version)

    async def served(made: Any, version: int) -> None:
        await serve(made)
        ahead.published(version)

    publisher = Publisher(written, served if first else None)

    async def offer(version: int) -> None:
        """Have the policy published beside what follows, if the last one is on its way."""
        full = await asyncio.to_thread(agree, publisher.full)
        if not full[0]:
            publisher.offer(await asyncio.to_thread(copy, learning.policy, version), version)

    try:
        await offer(start)
        for step in range(start, config.steps):
            began = time.monotonic()
            taken: list[Group[Trajectory]] | None = []
            if first:
                taken = await unless_noticed(publisher.unless_failed(ahead.take(step)))
            if not (await asyncio.to_thread(agree, taken is not None))[0]:
                raise stopped(learning)
            assert taken is not None
            waited = time.monotonic() - began
            groups = await asyncio.to_thread(_on_all_hosts, run, step + 1, taken, config)
            own = [groups[g] for g in groups_of(host_index(), config)]
            values = await asyncio.to_thread(episode_metrics, own)
            values |= _staleness(taken, step)
            values |= {"stale/dropped": float(ahead.dropped), "stale/ready": float(ahead.ready)}
            fed = {g: groups[g] for host in learning.share.peers for g in groups_of(host, config)}
            values |= await asyncio.to_thread(learning.learn, fed)
            if step + 1 < config.steps:
                await offer(step + 1)
            wall = time.monotonic() - began
            values |= {
                "time/rollout_s": waited,
                "time/learn_s": wall - waited,
                "time/learner_idle": waited / max(wall, 1e-9),
                **{f"time/{name}": value for name, value in server_metrics().items()},
            }
            learning.metrics.write("rl", step + 1, values)
            stop = await asyncio.to_thread(noticed_by_any) and step + 1 < config.steps
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                await asyncio.to_thread(learning.keep, values)
            on_step(step + 1, config.steps, values)
            if stop:
                raise stopped(learning, values)
    finally:
        await publisher.close()
        await ahead.close()
        learning.close()
    last = await written(await asyncio.to_thread(copy, learning.policy, config.steps), config.steps)
    if first:
        await serve(last)
    return learning.policy


def _on_all_hosts(
    run: Path, step: int, taken: Sequence[Group[Trajectory]], config: RLConfig
) -> list[Sequence[Trajectory]]:
    """The step's groups, which the first host gives, on every host; kept in the run folder."""
    done = [trajectory for group in taken for trajectory in group.done]
    if host_index() == 0:
        keep_episodes(run, step, done, hosts=1)
    barrier(f"episodes of step {step}")
    return cut(done if host_index() == 0 else load(episodes_file(run, step)), config)


def _staleness(groups: Sequence[Group[Trajectory]], step: int) -> dict[str, float]:
    """How many versions old the sampled tokens are: the mean, the largest, and shares by age.
    Known to the host that rolled out, which is the one that writes metrics."""
    ages: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.done:
            ages.update(step - v for v in trajectory.versions if v >= 0)
    total = sum(ages.values())
    values = {f"stale/age_{age}": count / total for age, count in sorted(ages.items())}
    mean = sum(age * count for age, count in ages.items()) / max(total, 1)
    return values | {"stale/mean": mean, "stale/max": float(max(ages, default=0))}
