"""GRPO: roll out groups, turn verdicts into advantages, update, publish, repeat.

Synchronous: the policy that samples a step's episodes is the policy that the step updates
(``rl/train_ahead.py`` lets rollouts run ahead). Every random choice derives from (seed, step,
episode), so a run that was killed and started again goes through the same numbers, also on another
number of hosts: each host rolls out whole groups, packs rows of its own, and all take part in every
update.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError, Preempted
from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.hosts import agree, barrier, host_count, host_index
from model.preempt import noticed_by_any, unless_noticed
from model.qwen3 import Params
from model.share import Share, share_of, spread
from rl.advantage import group_advantages
from rl.correction import correct
from rl.credit import turn_credits
from rl.loss import LossConfig, loss_of_rows
from rl.rollout import Episode
from sandbox.task import Task
from sft.batches import even
from sft.learner import Learner, OptimizerConfig, TrainState
from sft.metrics import Metrics
from sft.packing import Example, Rows, microbatches, pack
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, load, save


@dataclass(frozen=True)
class RLConfig:
    """Attributes:
    steps: rollout batches; the policy is published after each.
    tasks_per_step, group_size: episodes of a step = tasks × group.
    updates_per_step: optimizer updates that a step's episodes are cut into, group by group.
    row_tokens, row_targets, microbatch_rows: shape of the learner's batches, over all hosts.
    checkpoint_every: steps between checkpoints, of which the newest two are kept.
    keep_best: checkpoints with the highest training success to keep besides.
    turn_credit: weight of the credit for turns that test a new edit, beside the verdict's.
    only_solved: take only tasks that the teacher solved: on others most groups fail whole, and
      teach nothing.
    max_staleness: versions that rollouts may be behind the learner; 0: each step rolls out, then
      learns, in turn.
    spare: episodes of a group beyond `group_size`, of which the last to end are cancelled. Only
      where rollouts run ahead.
    weight_cap: of the importance weights between server and learner (rl/correction.py); 0: none,
      the server's log-probabilities count as the learner's.
    scale_advantages: divide a group's advantages by the standard deviation of its rewards.
    """

    steps: int = 20
    tasks_per_step: int = 12
    group_size: int = 8
    updates_per_step: int = 1
    row_tokens: int = 1024
    row_targets: int = 512
    microbatch_rows: int = 8
    checkpoint_every: int = 4
    keep_best: int = 0
    scale_advantages: bool = True
    turn_credit: float = 0.0
    only_solved: bool = False
    max_staleness: int = 0
    spare: int = 0
    weight_cap: float = 0.0
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


Rollout = Callable[[Sequence[Episode]], Coroutine[Any, Any, list[Trajectory]]]
Publish = Callable[[Params, int], Awaitable[None] | None]


@dataclass
class Learning:
    """What a loop learns with. `state` is replaced with each step."""

    learner: Learner
    state: TrainState
    reference: Params | None
    share: Share
    metrics: Metrics
    checkpoints: Checkpoints


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
    learning = begin(config, model, params, tasks, run, mesh, temperature)
    checkpoints, share = learning.checkpoints, learning.share
    start = int(learning.state.step) // config.updates_per_step

    def keep(step: int, values: dict[str, float] | None = None) -> None:
        checkpoints.save(
            step, learning.state._asdict(), score=values["rl/success"] if values else None
        )

    def stopped(step: int) -> Preempted:
        checkpoints.close()
        return Preempted(f"RL has saved step {step} of {config.steps}")

    for step in range(start, config.steps):
        began = time.monotonic()
        await _published(publish, learning.state.params, step)
        episodes = episodes_of_step(tasks, config, seed, step)
        own = _groups_of(host_index(), config)
        done = await unless_noticed(rollout([e for group in own for e in episodes[group]]))
        if not all(agree(done is not None)):  # nothing of this step is kept
            if step not in checkpoints.steps():
                keep(step)
            raise stopped(step)
        assert done is not None
        rolled = time.monotonic()
        values = episode_metrics(_cut(done, config))
        keep_episodes(run, step + 1, done)
        groups = dict(zip(own, _cut(done, config), strict=True))
        groups |= _of_peers(run, step + 1, share, config)
        values |= learn(learning, groups, config)
        values |= {"time/rollout_s": rolled - began, "time/learn_s": time.monotonic() - rolled}
        values |= {f"time/{name}": value for name, value in server_metrics().items()}
        learning.metrics.write("rl", step + 1, values)
        stop = noticed_by_any() and step + 1 < config.steps
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stop:
            keep(step + 1, values)
        on_step(step + 1, config.steps, values)
        if stop:
            raise stopped(step + 1)
    checkpoints.close()
    await _published(publish, learning.state.params, config.steps)
    return learning.state.params


def begin(
    config: RLConfig,
    model: Qwen3Config,
    params: Params,
    tasks: Sequence[Task],
    run: Path,
    mesh: Mesh | None,
    temperature: float,
) -> Learning:
    """The learner, where its last checkpoint left it. Raises InputError for too few tasks."""
    if len(tasks) < config.tasks_per_step:
        raise InputError(
            f"a step wants {config.tasks_per_step} tasks, there are {len(tasks)}: "
            "lower tasks_per_step or make more tasks"
        )
    updates = config.steps * config.updates_per_step
    rule, loss = config.optimizer.build(updates), loss_of_rows(config.loss)
    learner = Learner(model, rule, loss, mesh, temperature, offload=config.optimizer.offload)
    metrics = Metrics(run)
    checkpoints = Checkpoints(run / "checkpoints" / "rl", best=config.keep_best, background=True)
    params = spread(params, model, mesh)
    state = learner.init(params)
    restored = checkpoints.restore_latest(state._asdict())
    if restored is not None:
        state = learner.place(TrainState(**restored))
    reference = learner.place_params(params) if config.loss.kl_coef else None
    metrics.rewind("rl", int(state.step) // config.updates_per_step)
    return Learning(learner, state, reference, share_of(mesh), metrics, checkpoints)


def learn(
    learning: Learning, groups: dict[int, Sequence[Trajectory]], config: RLConfig
) -> dict[str, float]:
    """The updates of one step, from its groups by number; means of their metrics."""
    learner, params, reference = learning.learner, learning.state.params, learning.reference
    updates: list[list[Rows]] = []
    totals: list[dict[str, float]] = []
    for update in range(config.updates_per_step):  # all against the policy that begins the step
        mine = [groups[g] for g in sorted(groups) if g % config.updates_per_step == update]
        batches = _batches(mine, config, learning.share)
        batches = even(batches, max(agree(len(batches))))
        mismatch: dict[str, float] = {}
        if config.weight_cap:
            score = functools.partial(learner.logprobs, params)
            batches, mismatch = correct(batches, score, config.weight_cap)
        if reference is not None:
            batches = [
                rows._replace(ref_logprob=learner.logprobs(reference, rows)) for rows in batches
            ]
        updates.append(batches)
        totals.append(mismatch)
    for number, batches in enumerate(updates):
        learning.state, values = learner.step(learning.state, batches)
        totals[number] = values | totals[number]
    means = {_prefixed(k): float(np.mean([t[k] for t in totals])) for k in totals[0]}
    rate = config.optimizer.rate(config.steps * config.updates_per_step)
    return means | {"rl/lr": float(rate(int(learning.state.step) - 1))}


async def _published(publish: Publish, params: Params, version: int) -> None:
    outcome = publish(params, version)
    if inspect.isawaitable(outcome):
        await outcome


def episodes_of_step(
    tasks: Sequence[Task], config: RLConfig, seed: int, step: int
) -> list[list[Episode]]:
    """The step's groups: tasks in a new order each pass through the set."""
    chosen = []
    for i in range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step):
        lap, at = divmod(i, len(tasks))
        chosen.append(tasks[np.random.default_rng([seed, lap]).permutation(len(tasks))[at]])
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


def _groups_of(host: int, config: RLConfig) -> list[int]:
    """The groups of a step that a host rolls out: in turn, within what each update takes."""
    groups = range(config.tasks_per_step)
    return [g for g in groups if g // config.updates_per_step % host_count() == host]


def _cut(episodes: Sequence[Trajectory], config: RLConfig) -> list[Sequence[Trajectory]]:
    size = config.group_size
    return [episodes[i : i + size] for i in range(0, len(episodes), size)]


def _file(run: Path, step: int, host: int) -> Path:
    """Where a host keeps its episodes of a step, numbered from 1."""
    whose = f".host-{host}-of-{host_count()}" if host_count() > 1 else ""
    return run / "trajectories" / f"rl-{step:06d}{whose}.jsonl"


def keep_episodes(run: Path, step: int, done: Sequence[Trajectory]) -> None:
    """Write this host's episodes; those of an earlier try on other hosts go."""
    save(_file(run, step, host_index()), done)
    if host_index() == 0:
        current = {_file(run, step, host) for host in range(host_count())}
        for old in set((run / "trajectories").glob(f"rl-{step:06d}*.jsonl")) - current:
            old.unlink()


def _of_peers(run: Path, step: int, share: Share, config: RLConfig) -> dict[int, Any]:
    """The groups of the other hosts that feed the same rows as this one, by number."""
    groups: dict[int, Any] = {}
    if len(share.peers) > 1:  # then it is so on every host
        barrier(f"episodes of step {step}")
        for host in set(share.peers) - {host_index()}:
            found = _cut(load(_file(run, step, host)), config)
            groups |= zip(_groups_of(host, config), found, strict=True)
    return groups


def _batches(groups: Sequence[Sequence[Trajectory]], config: RLConfig, share: Share) -> list[Rows]:
    """Learner batches from whole groups, this host's share of their rows.

    Groups without signal still count as tokens in the denominator would, so they are left out:
    their gradient is zero (dynamic sampling, DAPO)."""
    data = []
    for group in groups:
        outcomes = group_advantages([t.reward for t in group], scale=config.scale_advantages)
        credit = turn_credits(group, config.turn_credit)
        if not any(outcomes) and not any(map(any, credit)):
            continue
        for t, outcome, turns in zip(group, outcomes, credit, strict=True):
            weight = [float(a == POLICY) for a in t.author]
            advantage = [outcome + (turns[n] if n >= 0 else 0.0) for n in t.turn_of_ids()]
            data.append(Example(t.ids, weight, t.logprobs, advantage))
    rows = pack(data, config.row_tokens, config.row_targets)
    return microbatches(rows, share.rows(config.microbatch_rows))


def episode_metrics(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Means over a step's episodes on all hosts; `groups`: this host's. `rl/informative` is the
    share of groups whose rewards differ."""
    flat = [t for group in groups for t in group]
    here = {
        "episodes": len(flat),
        "groups": len(groups),
        "rl/reward": sum(t.reward for t in flat),
        "rl/success": sum(t.success for t in flat),
        "rl/informative": sum(len({t.reward for t in group}) > 1 for group in groups),
        "rl/tokens": sum(a != ENVIRONMENT for t in flat for a in t.author),
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


def _prefixed(name: str) -> str:
    return name if "/" in name else f"rl/{name}"
