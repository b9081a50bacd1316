"""GRPO: roll out groups, turn verdicts into advantages, update, publish, repeat.

Synchronous: the policy that samples a step's episodes is the policy that the step updates. Every
random choice derives from (seed, step, episode), so a run that was killed and started again goes
through the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError
from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.qwen3 import Params
from rl.advantage import group_advantages
from rl.credit import turn_credits
from rl.loss import LossConfig, loss_of_rows
from rl.rollout import Episode
from sandbox.task import Task
from sft.learner import Learner, OptimizerConfig, TrainState
from sft.metrics import Metrics
from sft.packing import Example, Rows, microbatches, pack
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, save


@dataclass(frozen=True)
class RLConfig:
    """Attributes:
    steps: rollout batches; the policy is published after each.
    tasks_per_step, group_size: episodes of a step = tasks × group.
    updates_per_step: optimizer updates that a step's episodes are cut into, group by group.
    row_tokens, row_targets, microbatch_rows: shape of the learner's batches.
    checkpoint_every: steps between checkpoints, of which the newest two are kept.
    keep_best: checkpoints with the highest training success to keep besides.
    turn_credit: weight of the credit for turns that test a new edit, beside the verdict's.
    only_solved: take only tasks that the teacher solved: on others most groups fail whole, and
      teach nothing.
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
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


Rollout = Callable[[Sequence[Episode]], Awaitable[list[Trajectory]]]
Publish = Callable[[Params, int], None]


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
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """Train from `params`, also the reference policy, in the run folder `run`.

    `rollout` runs episodes with the weights that were last given to `publish(params, version)`,
    sampling at `temperature`.
    Resumes after the last checkpoint; the episodes of each step are kept in `trajectories/`.
    """
    if len(tasks) < config.tasks_per_step:
        raise InputError(
            f"a step wants {config.tasks_per_step} tasks, there are {len(tasks)}: "
            "lower tasks_per_step or make more tasks"
        )

    updates = config.steps * config.updates_per_step
    rule, loss = config.optimizer.build(updates), loss_of_rows(config.loss)
    learner = Learner(model, rule, loss, mesh, temperature)
    metrics = Metrics(run)
    checkpoints = Checkpoints(run / "checkpoints" / "rl", best=config.keep_best, background=True)
    state = learner.init(params)
    restored = checkpoints.restore_latest(state._asdict())
    if restored is not None:
        state = learner.place(TrainState(**restored))
    start = int(state.step) // config.updates_per_step
    metrics.rewind("rl", start)
    for step in range(start, config.steps):
        began = time.monotonic()
        publish(state.params, step)
        episodes = _episodes(tasks, config, seed, step)
        done = await rollout(episodes)
        save(run / "trajectories" / f"rl-{step + 1:06d}.jsonl", done)
        rolled = time.monotonic()
        groups = [done[i : i + config.group_size] for i in range(0, len(done), config.group_size)]
        values = _episode_metrics(groups)
        totals: list[dict[str, float]] = []
        for update in range(config.updates_per_step):
            batches = _batches(groups[update :: config.updates_per_step], config)
            if config.loss.kl_coef:
                batches = [
                    rows._replace(ref_logprob=learner.logprobs(params, rows)) for rows in batches
                ]
            state, update_values = learner.step(state, batches)
            totals.append(update_values)
        values |= {_prefixed(k): float(np.mean([t[k] for t in totals])) for k in totals[0]}
        values |= {"time/rollout_s": rolled - began, "time/learn_s": time.monotonic() - rolled}
        metrics.write("rl", step + 1, values)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoints.save(step + 1, state._asdict(), score=values["rl/success"])
        on_step(step + 1, config.steps, values)
    checkpoints.close()
    publish(state.params, config.steps)
    return jax.tree.map(np.asarray, state.params)


def _episodes(tasks: Sequence[Task], config: RLConfig, seed: int, step: int) -> list[Episode]:
    """The step's episodes, group by group: tasks in a new order each pass through the set."""
    chosen = []
    for i in range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step):
        lap, at = divmod(i, len(tasks))
        chosen.append(tasks[np.random.default_rng([seed, lap]).permutation(len(tasks))[at]])
    return [
        Episode(task, episode_seed(seed, step, group, member))
        for group, task in enumerate(chosen)
        for member in range(config.group_size)
    ]


def episode_seed(*parts: int) -> int:
    """A 31-bit seed from the numbers that identify an episode."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def _batches(groups: Sequence[Sequence[Trajectory]], config: RLConfig) -> list[Rows]:
    """Learner batches from whole groups. Groups without signal still count as tokens in the
    denominator would, so they are left out: their gradient is zero (dynamic sampling, DAPO)."""
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
    return microbatches(rows, config.microbatch_rows)


def _episode_metrics(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Means over a step's episodes; `rl/informative` is the share whose verdicts differ."""
    flat = [t for group in groups for t in group]
    rewards = [[t.reward for t in group] for group in groups]
    return {
        "rl/reward": float(np.mean([t.reward for t in flat])),
        "rl/success": float(np.mean([t.success for t in flat])),
        "rl/informative": float(np.mean([len(set(r)) > 1 for r in rewards])),
        "rl/tokens": float(np.mean([sum(a != ENVIRONMENT for a in t.author) for t in flat])),
        "rl/turns": float(np.mean([len(t.turns) for t in flat])),
        "rl/submitted": float(np.mean([t.stop == "submit" for t in flat])),
    }


def _prefixed(name: str) -> str:
    return name if "/" in name else f"rl/{name}"
