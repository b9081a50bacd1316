"""PPO and GRPO: roll out groups, turn verdicts into advantages, update, publish, repeat.

Synchronous: the policy that samples a step's episodes is the policy that the step updates. Every
random choice derives from (seed, step, episode), so a run that was killed and started again goes
through the same numbers, also on another number of hosts: each host rolls out whole groups, packs
rows of its own, and all take part in every update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError, Preempted
from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.hosts import agree, barrier, host_count, host_index
from model.preempt import noticed_by_any, unless_noticed
from model.qwen3 import Params
from model.share import Share, share_of, spread
from rl.curriculum import Curriculum, outcomes
from rl.experience import AdvantageConfig, CriticConfig, Scores, Shape, prepare
from rl.loss import LossConfig, critic_loss, loss_of_rows
from rl.rollout import Episode
from sandbox.task import Task
from sft.learner import Learner, OptimizerConfig, TrainState
from sft.metrics import Metrics
from sft.trajectory import ENVIRONMENT, Trajectory, load, save


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
    scale_advantages: divide a group's advantages by the standard deviation of its rewards.
    epochs: passes over a step's episodes, each with its updates in a new order.
    critic: for advantage.kind gae.
    curriculum: draw tasks by how far from certain their success is (`rl/curriculum.py`).
    recompute_old: π_old is the learner's own number, not the server's.
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
    epochs: int = 1
    curriculum: bool = False
    recompute_old: bool = False
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    critic: CriticConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if (self.critic is not None) != (self.advantage.kind == "gae"):
            raise InputError("rl: a critic goes with advantage.kind: gae, and only with it")
        if self.critic is not None and self.turn_credit:
            raise InputError("rl: turn_credit is for groups; a critic credits every token itself")
        shared = self.critic is not None and self.critic.network == "shared"
        if shared and self.loss.aggregate != "token":
            raise InputError("rl: a critic on the policy's own network wants loss.aggregate: token")
        if self.loss.importance_cap and not self.recompute_old:
            raise InputError(
                "rl.loss: importance_cap compares learner and server: set recompute_old"
            )
        if self.loss.objective == "gspo" and (self.turn_credit or self.advantage.kind == "gae"):
            raise InputError(
                "rl.loss: gspo wants one advantage for a whole sequence: group or rloo"
            )


Rollout = Callable[[Sequence[Episode]], Coroutine[Any, Any, list[Trajectory]]]
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

    Raises:
      InputError: fewer tasks than a step takes.
      Preempted: a host was told to stop; there is a checkpoint of the last whole step.
    """
    if len(tasks) < config.tasks_per_step:
        raise InputError(
            f"a step wants {config.tasks_per_step} tasks, there are {len(tasks)}: "
            "lower tasks_per_step or make more tasks"
        )

    per_step = config.updates_per_step * config.epochs
    updates = config.steps * per_step
    critic, valued = _critic(config, model, updates, mesh)
    if critic is None:
        model = valued
    rule, loss = config.optimizer.build(updates), loss_of_rows(config.loss)
    learner = Learner(model, rule, loss, mesh, temperature, offload=config.optimizer.offload)
    metrics = Metrics(run)
    checkpoints = Checkpoints(run / "checkpoints" / "rl", best=config.keep_best, background=True)
    with_value = _with_value(params, valued)
    params = spread(with_value if critic is None else params, model, mesh)
    state = learner.init(params)
    critic_state = critic.init(spread(with_value, valued, mesh)) if critic is not None else None

    def tree() -> dict[str, Any]:
        own = {} if critic_state is None else {"critic": critic_state._asdict()}
        return state._asdict() | own

    restored = checkpoints.restore_latest(tree())
    if restored is not None:
        if critic is not None:
            critic_state = critic.place(TrainState(**restored.pop("critic")))
        state = learner.place(TrainState(**restored))
    reference = learner.place_params(params) if config.loss.kl_coef else None
    share = share_of(mesh)
    start = int(state.step) // per_step
    shape = Shape(config.row_tokens, config.row_targets, config.microbatch_rows)
    curriculum = Curriculum(tasks) if config.curriculum else None
    if curriculum is not None:
        for step in range(start):
            for path in sorted((run / "trajectories").glob(f"rl-{step + 1:06d}*.jsonl")):
                curriculum.record(outcomes(load(path)))
    metrics.rewind("rl", start)

    def keep(step: int, values: dict[str, float] | None = None) -> None:
        checkpoints.save(step, tree(), score=values["rl/success"] if values else None)

    def stopped(step: int) -> Preempted:
        checkpoints.close()
        return Preempted(f"RL has saved step {step} of {config.steps}")

    for step in range(start, config.steps):
        began = time.monotonic()
        publish(_policy(state.params), step)
        chosen = None
        if curriculum is not None:
            chosen = curriculum.choose(config.tasks_per_step, (seed, step))
        episodes = _episodes(tasks, config, seed, step, chosen)
        own = _groups_of(host_index(), config)
        done = await unless_noticed(rollout([e for group in own for e in episodes[group]]))
        if not all(agree(done is not None)):  # nothing of this step is kept
            if step not in checkpoints.steps():
                keep(step)
            raise stopped(step)
        assert done is not None
        rolled = time.monotonic()
        values = _episode_metrics(_cut(done, config))
        _keep_episodes(run, step + 1, done)
        groups = dict(zip(own, _cut(done, config), strict=True))
        groups |= _of_peers(run, step + 1, share, config)
        if curriculum is not None:
            for found in agree([o for g in own for o in outcomes(groups[g])]):
                curriculum.record((name, solved) for name, solved in found)
        now, judge = state.params, critic_state or state
        scores = Scores(
            reference=partial(learner.logprobs, reference) if reference is not None else None,
            value=partial((critic or learner).values, judge.params) if config.critic else None,
            old=partial(learner.logprobs, now) if config.recompute_old else None,
        )
        experience = [
            prepare(
                [groups[g] for g in sorted(groups) if g % config.updates_per_step == update],
                config.advantage,
                config.loss,
                shape,
                share,
                scores,
                scale=config.scale_advantages,
                credit=config.turn_credit,
            )
            for update in range(config.updates_per_step)
        ]
        totals: list[dict[str, float]] = []
        for update in _order(config, seed, step):
            state, update_values = learner.step(state, experience[update])
            if critic is not None and critic_state is not None:
                critic_state, of_critic = critic.step(critic_state, experience[update])
                own_names = {"loss": "critic/loss", "grad_norm": "critic/grad_norm"}
                update_values |= {own_names.get(k, k): v for k, v in of_critic.items()}
            totals.append(update_values)
        values |= {_prefixed(k): float(np.mean([t[k] for t in totals])) for k in totals[0]}
        values |= {"time/rollout_s": rolled - began, "time/learn_s": time.monotonic() - rolled}
        metrics.write("rl", step + 1, values)
        stop = noticed_by_any() and step + 1 < config.steps
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stop:
            keep(step + 1, values)
        on_step(step + 1, config.steps, values)
        if stop:
            raise stopped(step + 1)
    checkpoints.close()
    publish(_policy(state.params), config.steps)
    return _policy(state.params)


def _critic(
    config: RLConfig, model: Qwen3Config, updates: int, mesh: Mesh | None
) -> tuple[Learner | None, Qwen3Config]:
    """The learner of a critic with a network of its own, and the config of the network that has the
    critic's head: the critic's, or the policy's."""
    if config.critic is None:
        return None, model
    valued = replace(model, value_head=True)
    if config.critic.network == "shared":
        return None, valued
    optimizer = config.critic.optimizer
    rule, loss = optimizer.build(updates), critic_loss(config.loss)
    return Learner(valued, rule, loss, mesh, offload=optimizer.offload), valued


def _with_value(params: Params, model: Qwen3Config) -> Params:
    """`params` with a critic's head that says 0 everywhere, if the model has one."""
    head = {"value": jnp.zeros(model.hidden_size, model.param_dtype)} if model.value_head else {}
    return params | head


def _policy(params: Params) -> Params:
    """`params` without a critic's head: what is served."""
    return {name: value for name, value in params.items() if name != "value"}


def _order(config: RLConfig, seed: int, step: int) -> list[int]:
    """The updates of a step: in turn, then in a new order each further epoch."""
    found = list(range(config.updates_per_step))
    for epoch in range(1, config.epochs):
        rng = np.random.default_rng([seed, step, epoch])
        found += rng.permutation(config.updates_per_step).tolist()
    return found


def _episodes(
    tasks: Sequence[Task],
    config: RLConfig,
    seed: int,
    step: int,
    chosen: Sequence[Task] | None = None,
) -> list[list[Episode]]:
    """The step's groups: of the chosen tasks, or tasks in a new order each pass through the set."""
    if chosen is None:
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


def _keep_episodes(run: Path, step: int, done: Sequence[Trajectory]) -> None:
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


def _episode_metrics(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
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
