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
from typing import Any, TypeVar

from jax.sharding import Mesh

from configs.errors import Preempted
from model.config import Qwen3Config
from model.hosts import agree, barrier, host_index, leave
from model.preempt import noticed_by_any, unless_noticed
from model.qwen3 import Params
from rl.ahead import Ahead, Group, Publisher
from rl.learning import Learning, RLConfig
from rl.rollout import Episode
from rl.train import (
    check_tasks,
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
from sft.trajectory import Stored, Trajectory

T = TypeVar("T")
Roll = Callable[[Episode], Coroutine[Any, Any, Trajectory]]  # one, with the newest weights
Copy = Callable[[Params, int], Any]  # of a version, which nothing changes any more
Write = Callable[[Any, int], Any]  # such a copy, as a snapshot
Serve = Callable[[Any], Coroutine[Any, Any, None]]  # such a snapshot


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
        full = await together(agree, publisher.full)
        if not full[0]:
            publisher.offer(await asyncio.to_thread(copy, learning.policy, version), version)

    async def together(work: Callable[..., T], *arguments: Any) -> T:
        """`work`, which waits for other hosts, in a thread; raises where publishing failed, for
        they may be waiting for this host to publish."""
        return await publisher.unless_failed(asyncio.to_thread(work, *arguments))

    try:
        if start < config.steps:
            await offer(start)
        for step in range(start, config.steps):
            began = time.monotonic()
            taken: list[Group[Trajectory]] | None = []
            if first:
                taken = await unless_noticed(publisher.unless_failed(ahead.take(step)))
            if not (await together(agree, taken is not None))[0]:
                raise stopped(learning)
            assert taken is not None
            waited = time.monotonic() - began
            peers = learning.share.peers
            groups = await together(_groups_for, peers, run, step + 1, taken, config)
            own = [groups[g] for g in groups_of(host_index(), config)]
            values = await together(episode_metrics, own)
            values |= _staleness(taken, step)
            values |= {"stale/dropped": float(ahead.dropped), "stale/ready": float(ahead.ready)}
            values |= await asyncio.to_thread(learning.learn, groups)
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
            stop = await together(noticed_by_any) and step + 1 < config.steps
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                await asyncio.to_thread(learning.keep, values)
            on_step(step + 1, config.steps, values)
            if stop:
                raise stopped(learning, values)
        await publisher.close()
        copied = await asyncio.to_thread(copy, learning.policy, config.steps)
        last = await written(copied, config.steps)
        if first:
            await serve(last)
    except Preempted:  # on all hosts, at the same place
        await publisher.close()
        raise
    except BaseException:
        leave()
        await publisher.abandon()
        raise
    finally:
        await ahead.close()
        learning.close()
    return learning.policy


def _groups_for(
    hosts: Sequence[int], run: Path, step: int, taken: Sequence[Group[Trajectory]], config: RLConfig
) -> dict[int, Sequence[Trajectory]]:
    """Those of a step's groups, by number, that these hosts roll out where each does its own: what
    this one learns from. The first host gives all, through the run folder."""
    done: Sequence[Trajectory] = [trajectory for group in taken for trajectory in group.done]
    if host_index() == 0:
        keep_episodes(run, step, done, hosts=1)
    barrier(f"episodes of step {step}")
    if host_index() > 0:
        done = Stored(episodes_file(run, step))
    size = config.group_size
    return {g: done[g * size : (g + 1) * size] for host in hosts for g in groups_of(host, config)}


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
