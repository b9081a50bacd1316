"""PPO and GRPO: roll out groups, turn verdicts into advantages, update, publish, repeat.

Synchronous: the policy that samples a step's episodes is the policy that the step updates
(``rl/train_ahead.py`` lets rollouts run ahead). Every random choice derives from (seed, step,
episode), so a run that was killed and started again goes through the same numbers, also on another
number of hosts: each host rolls out whole groups, packs rows of its own, and all take part in every
update.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError, Preempted
from model.config import Qwen3Config
from model.hosts import agree, barrier, host_count, host_index
from model.preempt import noticed_by_any, unless_noticed
from model.qwen3 import Params
from model.share import Share
from rl.curriculum import Curriculum, outcomes
from rl.learning import Learning, RLConfig
from rl.rollout import Episode
from sandbox.task import Task
from sft.tracking import Tracker
from sft.trajectory import WRITTEN, Trajectory, load, save

Rollout = Callable[[Sequence[Episode]], Coroutine[Any, Any, list[Trajectory]]]
Publish = Callable[[Params, int], Awaitable[None] | None]


async def train_rl(
    config: RLConfig,
    model: Qwen3Config,
    params: Params,
    tasks: Sequence[Task],
    run: Path,
    *,
    seed: int,
    temperature: float,
    rollout: Rollout,
    publish: Publish,
    mesh: Mesh | None = None,
    server_metrics: Callable[[], dict[str, float]] = dict,
    trackers: Sequence[Tracker] = (),
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """Train from `params`, also the reference policy, in the run folder `run`.

    `rollout` runs episodes with the weights that were last given to `publish(params, version)`,
    sampling at `temperature`. `server_metrics`: figures of the servers since the last call.
    Resumes after the last checkpoint; the episodes of each step are kept in `trajectories/`.

    Raises:
      InputError: fewer tasks than a step takes.
      Preempted: a host was told to stop; there is a checkpoint of the last whole step.
    """
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
    curriculum = _curriculum(tasks, run, learning.version) if config.curriculum else None
    for step in range(learning.version, config.steps):
        began = time.monotonic()
        await _published(publish, learning.policy, step)
        chosen = None
        if curriculum is not None:
            chosen = curriculum.choose(config.tasks_per_step, (seed, step))
        episodes = episodes_of_step(tasks, config, seed, step, chosen)
        own = groups_of(host_index(), config)
        done = await unless_noticed(rollout([e for group in own for e in episodes[group]]))
        if not all(agree(done is not None)):  # nothing of this step is kept
            raise stopped(learning)
        assert done is not None
        rolled = time.monotonic()
        values = episode_metrics(_cut(done, config))
        keep_episodes(run, step + 1, done, host_count())
        groups = dict(zip(own, _cut(done, config), strict=True))
        if curriculum is not None:
            for found in agree([o for g in own for o in outcomes(groups[g])]):
                curriculum.record(found)
        groups |= _of_peers(run, step + 1, learning.share, config)
        values |= learning.learn(groups)
        values |= {"time/rollout_s": rolled - began, "time/learn_s": time.monotonic() - rolled}
        values |= {f"time/{name}": value for name, value in server_metrics().items()}
        learning.metrics.write("rl", step + 1, values)
        stop = noticed_by_any() and step + 1 < config.steps
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            learning.keep(values)
        on_step(step + 1, config.steps, values)
        if stop:
            raise stopped(learning, values)
    learning.close()
    await _published(publish, learning.policy, config.steps)
    return learning.policy


def stopped(learning: Learning, values: dict[str, float] | None = None) -> Preempted:
    """Save where learning is, with the metrics of its last step, and close it; what to raise."""
    learning.keep(values)
    learning.close()
    return Preempted(f"RL has saved step {learning.version} of {learning.config.steps}")


def _curriculum(tasks: Sequence[Task], run: Path, steps: int) -> Curriculum:
    """With what the first steps found out."""
    curriculum = Curriculum(tasks)
    for step in range(steps):
        for path in sorted((run / "trajectories").glob(f"rl-{step + 1:06d}*.jsonl")):
            curriculum.record(outcomes(load(path)))
    return curriculum


def check_tasks(tasks: Sequence[Task], config: RLConfig) -> None:
    """Raise InputError for fewer than a step takes."""
    if len(tasks) < config.tasks_per_step:
        raise InputError(
            f"a step wants {config.tasks_per_step} tasks, there are {len(tasks)}: "
            "lower tasks_per_step or make more tasks"
        )


async def _published(publish: Publish, params: Params, version: int) -> None:
    outcome = publish(params, version)
    if inspect.isawaitable(outcome):
        await outcome


def episodes_of_step(
    tasks: Sequence[Task],
    config: RLConfig,
    seed: int,
    step: int,
    chosen: Sequence[Task] | None = None,
) -> list[list[Episode]]:
    """The step's groups: of the chosen tasks, or tasks in a new order each pass through the set."""
    if chosen is None:
        first = step * config.tasks_per_step
        laps = [divmod(first + i, len(tasks)) for i in range(config.tasks_per_step)]
        orders = {
            lap: np.random.default_rng([seed, lap]).permutation(len(tasks)) for lap, _ in laps
        }
        chosen = [tasks[orders[lap][at]] for lap, at in laps]
    return [
        [
            Episode(task, episode_seed(seed, step, group, member))
            for member in range(config.group_size)
        ]
        for group, task in enumerate(chosen)
    ]


def episode_seed(*parts: int) -> int:
    """A 31-bit seed from the numbers that identify an episode."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def groups_of(host: int, config: RLConfig) -> list[int]:
    """The groups of a step that a host rolls out: in turn, within what each update takes."""
    groups = range(config.tasks_per_step)
    return [g for g in groups if g // config.updates_per_step % host_count() == host]


def _cut(episodes: Sequence[Trajectory], config: RLConfig) -> list[Sequence[Trajectory]]:
    size = config.group_size
    return [episodes[i : i + size] for i in range(0, len(episodes), size)]


def episodes_file(run: Path, step: int, host: int = 0, hosts: int = 1) -> Path:
    """Where a host keeps its episodes of a step, numbered from 1; `hosts`: those that roll out."""
    whose = f".host-{host}-of-{hosts}" if hosts > 1 else ""
    return run / "trajectories" / f"rl-{step:06d}{whose}.jsonl"


def keep_episodes(run: Path, step: int, done: Sequence[Trajectory], hosts: int) -> None:
    """Write this host's episodes; those of an earlier try on other hosts go."""
    save(episodes_file(run, step, host_index(), hosts), done)
    if host_index() == 0:
        current = {episodes_file(run, step, host, hosts) for host in range(hosts)}
        for old in set((run / "trajectories").glob(f"rl-{step:06d}*.jsonl")) - current:
            old.unlink()


def _of_peers(run: Path, step: int, share: Share, config: RLConfig) -> dict[int, Any]:
    """The groups of the other hosts that feed the same rows as this one, by number."""
    groups: dict[int, Any] = {}
    if len(share.peers) > 1:  # then it is so on every host
        barrier(f"episodes of step {step}")
        for host in set(share.peers) - {host_index()}:
            found = _cut(load(episodes_file(run, step, host, host_count())), config)
            groups |= zip(groups_of(host, config), found, strict=True)
    return groups


def episode_metrics(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Means over a step's episodes on all hosts; `groups`: this host's. `rl/informative` is the
    share of groups whose rewards differ."""
    flat = [t for group in groups for t in group]
    here = {
        "episodes": len(flat),
        "groups": len(groups),
        "rl/reward": sum(t.reward for t in flat),
        "rl/success": sum(t.success for t in flat),
        "rl/quarantined": sum(t.verdict.get("verdict") == "quarantine" for t in flat),
        "rl/informative": sum(len({t.reward for t in group}) > 1 for group in groups),
        "rl/tokens": sum(a in WRITTEN for t in flat for a in t.author),
        "rl/turns": sum(len(t.turns) for t in flat),
        "rl/submitted": sum(t.stop == "submit" for t in flat),
    }
    given = agree(here)
    sums = {name: sum(host[name] for host in given) for name in here}
    episodes, of_groups = sums.pop("episodes"), sums.pop("groups")
    return {
        name: float(value / (of_groups if name == "rl/informative" else episodes))
        for name, value in sums.items()
    }
