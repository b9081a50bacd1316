"""What an RL loop learns with: the policy's learner, its critic and reference, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError
from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.hosts import host_count
from model.qwen3 import Params
from model.share import share_of, spread
from rl.experience import AdvantageConfig, CriticConfig, Scores, Shape, prepare
from rl.loss import LossConfig, critic_loss, loss_of_rows
from sft.learner import Learner, OptimizerConfig, TrainState
from sft.metrics import Metrics
from sft.packing import Rows
from sft.tracking import Tracker
from sft.trajectory import Trajectory


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
    epochs: passes over a step's episodes, each with its updates in a new order.
    advantage: how rewards become advantages. critic: for its kind "gae".
    curriculum: draw tasks by how far from certain their success is (rl/curriculum.py).
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
    epochs: int = 1
    curriculum: bool = False
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
        by_token = self.turn_credit or self.weight_cap or self.advantage.kind == "gae"
        if self.loss.objective == "gspo" and by_token:
            raise InputError(
                "rl.loss: gspo wants one advantage for a whole sequence: advantage.kind group or "
                "rloo, no turn_credit and no weight_cap"
            )
        if self.curriculum and self.max_staleness:
            raise InputError(
                "rl: a curriculum wants the outcomes of every step before the next: set "
                "max_staleness to 0"
            )


class Learning:
    """Built where the last checkpoint in the run folder left it.

    Attributes:
      version: whole steps that were learnt: the version of `policy`.
      share: which rows this host feeds. metrics: of the run.
    """

    def __init__(
        self,
        config: RLConfig,
        model: Qwen3Config,
        params: Params,
        run: Path,
        *,
        seed: int,
        temperature: float,
        mesh: Mesh | None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.config, self._seed = config, seed
        self.share, self.metrics = share_of(mesh), Metrics(run, trackers)
        self._shape = Shape(config.row_tokens, config.row_targets, config.microbatch_rows)
        self._per_step = config.updates_per_step * config.epochs
        updates = config.steps * self._per_step
        self._rate = config.optimizer.rate(updates)
        self._critic, network, valued = _critic(config, model, updates, mesh)
        params = spread(_with_value(params, network), network, mesh)
        self._learner = Learner(
            network,
            config.optimizer.build(updates),
            loss_of_rows(config.loss),
            mesh,
            temperature,
            offload=config.optimizer.offload,
            longest=_longest(config, mesh),
        )
        self._state = self._learner.init(params)
        self._critic_state: TrainState | None = None
        if self._critic is not None:
            start = spread(_with_value(params, valued), valued, mesh)
            self._critic_state = self._critic.init(start)
        self._checkpoints = Checkpoints(
            run / "checkpoints" / "rl", best=config.keep_best, background=True
        )
        self._restore()
        self._reference = self._learner.place_params(params) if config.loss.kl_coef else None
        self.version = int(self._state.step) // self._per_step
        self.metrics.rewind("rl", self.version)

    @property
    def policy(self) -> Params:
        """Its parameters, without a critic's head: what is served."""
        return {name: value for name, value in self._state.params.items() if name != "value"}

    def keep(self, values: dict[str, float] | None = None) -> None:
        """A checkpoint of this version, if there is none; `values`: the step's metrics."""
        if self.version not in self._checkpoints.steps():
            score = values["rl/success"] if values else None
            self._checkpoints.save(self.version, self._tree(), score=score)

    def close(self) -> None:
        """Wait until checkpoints are written."""
        self._checkpoints.close()

    def learn(self, groups: dict[int, Sequence[Trajectory]]) -> dict[str, float]:
        """The updates of the next step, from its groups by number; means of their metrics.

        All are against the policy that begins the step.
        """
        updates = range(self.config.updates_per_step)
        prepared = [self._prepared(groups, update) for update in updates]
        totals: list[dict[str, float]] = []
        for update in self._order():
            batches, known = prepared[update]
            self._state, values = self._learner.step(self._state, batches)
            if self._critic is not None and self._critic_state is not None:
                self._critic_state, found = self._critic.step(self._critic_state, batches)
                own = {"loss": "critic/loss", "grad_norm": "critic/grad_norm"}
                values |= {own.get(name, name): value for name, value in found.items()}
            totals.append(values | known)
        self.version += 1
        means = {_prefixed(k): float(np.mean([t[k] for t in totals])) for k in totals[0]}
        return means | {"rl/lr": float(self._rate(int(self._state.step) - 1))}

    def _prepared(
        self, groups: dict[int, Sequence[Trajectory]], update: int
    ) -> tuple[list[Rows], dict[str, float]]:
        """One update's batches, and what is known of them before it."""
        config, learner, params = self.config, self._learner, self._state.params
        judge, judged_by = learner, params
        if self._critic is not None and self._critic_state is not None:
            judge, judged_by = self._critic, self._critic_state.params
        reference = self._reference
        scores = Scores(
            reference=None if reference is None else partial(learner.logprobs, reference),
            value=partial(judge.values, judged_by) if config.critic else None,
            old=partial(learner.logprobs, params) if config.weight_cap else None,
        )
        return prepare(
            [groups[g] for g in sorted(groups) if g % config.updates_per_step == update],
            config.advantage,
            config.loss,
            self._shape,
            self.share,
            scores,
            scale=config.scale_advantages,
            credit=config.turn_credit,
            weight_cap=config.weight_cap,
        )

    def _order(self) -> list[int]:
        """The updates of a step: in turn, then in a new order each further epoch."""
        found = list(range(self.config.updates_per_step))
        for epoch in range(1, self.config.epochs):
            rng = np.random.default_rng([self._seed, self.version, epoch])
            found += rng.permutation(self.config.updates_per_step).tolist()
        return found

    def _tree(self) -> dict[str, Any]:
        critic = {} if self._critic_state is None else {"critic": self._critic_state._asdict()}
        return self._state._asdict() | critic

    def _restore(self) -> None:
        restored = self._checkpoints.restore_latest(self._tree())
        if restored is None:
            return
        if self._critic is not None:
            self._critic_state = self._critic.place(TrainState(**restored.pop("critic")))
        self._state = self._learner.place(TrainState(**restored))


def _critic(
    config: RLConfig, model: Qwen3Config, updates: int, mesh: Mesh | None
) -> tuple[Learner | None, Qwen3Config, Qwen3Config]:
    """The learner of a critic with a network of its own; the policy's network; and the one that has
    the critic's head, which may be the same."""
    if config.critic is None:
        return None, model, model
    valued = replace(model, value_head=True)
    if config.critic.network == "shared":
        return None, valued, valued
    optimizer = config.critic.optimizer
    rule, loss = optimizer.build(updates), critic_loss(config.loss)
    own = Learner(
        valued, rule, loss, mesh, offload=optimizer.offload, longest=_longest(config, mesh)
    )
    return own, model, valued


def _longest(config: RLConfig, mesh: Mesh | None) -> int:
    """Microbatches of an update whose every episode has a row of its own: there are never more."""
    share = share_of(mesh)
    groups = -(-config.tasks_per_step // config.updates_per_step)
    rows = -(-groups // host_count()) * len(share.peers) * config.group_size
    return max(1, -(-rows // share.rows(config.microbatch_rows)))


def _with_value(params: Params, model: Qwen3Config) -> Params:
    """`params` with a critic's head that says 0 everywhere, if the model has one."""
    head = {"value": jnp.zeros(model.hidden_size, model.param_dtype)} if model.value_head else {}
    return params | head


def _prefixed(name: str) -> str:
    return name if "/" in name else f"rl/{name}"
