"""Rolled-out groups into the learner's batches: reward, reference, values, advantages.

Where an advantage needs nothing but rewards it is known before the episodes are packed. A KL
penalty in the reward and a critic need numbers for every token from the learner, and come after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from configs.errors import InputError
from model.hosts import agree
from model.share import Share
from rl.advantage import gae, group_advantages, overlong_penalty, rloo_advantages
from rl.correction import correct
from rl.credit import turn_credits
from rl.loss import KL, LossConfig
from sft.batches import even
from sft.learner import OptimizerConfig
from sft.packing import Example, Plan, Rows, build, microbatches, plan_rows
from sft.trajectory import POLICY, Trajectory

Score = Callable[[Rows], np.ndarray]  # float32 [rows, targets] of one microbatch


@dataclass(frozen=True)
class AdvantageConfig:
    """Attributes:
    kind: "group" (GRPO), "rloo", or "gae", which needs a critic (PPO).
    whiten: then subtract the mean and divide by the standard deviation over the tokens of an
      update, as PPO does (and REINFORCE++, Hu 2025, arXiv 2501.03262, eq. 7-8).
    gamma, lam: GAE's discount and λ.
    keep_flat: keep groups without signal. Left out (DAPO) they change no gradient sum, but neither
      do they count in its divisor.
    overlong_limit, overlong_buffer: DAPO's soft penalty for length, in policy tokens; 0: none.
    """

    kind: Literal["group", "rloo", "gae"] = "group"
    whiten: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    keep_flat: bool = False
    overlong_limit: int = 0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        for name, value in {"gamma": self.gamma, "lam": self.lam}.items():
            if not 0 <= value <= 1:
                raise InputError(f"rl.advantage: {name} must lie in 0..1, got {value}")
        if self.overlong_limit and not 0 < self.overlong_buffer <= self.overlong_limit:
            raise InputError("rl.advantage: overlong_buffer must lie in 1..overlong_limit")


@dataclass(frozen=True)
class CriticConfig:
    """Attributes:
    network: "shared", a head on the policy's own network, trained together with it; "own", a copy
      of the starting policy's network with a head, and an optimizer of its own.
    optimizer: of the critic with its own network.
    """

    network: Literal["shared", "own"] = "own"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class Shape:
    """Of the learner's batches: tokens and loss slots of a row, rows of a microbatch."""

    tokens: int
    targets: int
    rows: int


@dataclass(frozen=True)
class Scores:
    """What the learner computes for every target slot of a microbatch; None: not needed.

    reference, value: log π_ref and the critic's V. old: log π_old, in place of the server's.
    """

    reference: Score | None = None
    value: Score | None = None
    old: Score | None = None


def rewards_of(group: Sequence[Trajectory], config: AdvantageConfig) -> list[float]:
    """The rewards of a group's episodes, with what is shaped."""
    rewards = [t.reward for t in group]
    if config.overlong_limit:
        lengths = [sum(a == POLICY for a in t.author) for t in group]
        limits = config.overlong_limit, config.overlong_buffer
        rewards = [r + overlong_penalty(n, *limits) for r, n in zip(rewards, lengths, strict=True)]
    return rewards


def outcome_advantages(
    rewards: Sequence[float], config: AdvantageConfig, scale: bool
) -> list[float]:
    """One number for each episode of a group; where a critic will tell, the reward itself."""
    if config.kind == "gae":
        return list(rewards)
    if config.kind == "rloo":
        return rloo_advantages(rewards)
    return group_advantages(rewards, scale=scale)


def prepare(
    groups: Sequence[Sequence[Trajectory]],
    config: AdvantageConfig,
    loss: LossConfig,
    shape: Shape,
    share: Share,
    scores: Scores,
    *,
    scale: bool,
    credit: float,
    weight_cap: float,
) -> tuple[list[Rows], dict[str, float]]:
    """Microbatches of whole groups, this host's share of their rows, ready for the learner; and
    metrics of the correction, where there is one (`rl/correction.py`).

    Every host calls this together, and all get the same number of microbatches.
    """
    data: list[Example] = []
    members: list[list[int]] = []  # the examples of each group that is kept
    rewards: list[list[float]] = []
    shaped = loss.kl_in == "reward" and loss.kl_coef > 0
    late = shaped or config.kind == "gae"
    for group in groups:
        known = rewards_of(group, config)
        outcomes = outcome_advantages(known, config, scale)
        credits = turn_credits(group, credit)
        # without signal their gradient is zero, but their tokens would count (dynamic sampling)
        if not (late or config.keep_flat or any(outcomes) or any(map(any, credits))):
            continue
        members.append(list(range(len(data), len(data) + len(group))))
        rewards.append(known)
        for t, outcome, turns in zip(group, outcomes, credits, strict=True):
            weight = [float(a == POLICY) for a in t.author]
            advantage = [outcome + (turns[n] if n >= 0 else 0.0) for n in t.turn_of_ids()]
            data.append(Example(t.ids, weight, t.logprobs, advantage))
    plan = plan_rows([example.size for example in data], shape.tokens, shape.targets)
    size = share.rows(shape.rows)
    batches = microbatches(build(data, plan, shape.tokens, shape.targets), size)
    batches = even(batches, max(agree(len(batches))))
    if scores.reference is not None:
        batches = [rows._replace(ref_logprob=scores.reference(rows)) for rows in batches]
    if scores.value is not None:
        batches = [rows._replace(old_value=scores.value(rows)) for rows in batches]
        batches = [rows._replace(returns=np.zeros_like(rows.weight)) for rows in batches]
    if late:
        _advantages_by_token(batches, plan, members, rewards, config, loss, shaped, scale)
    if config.whiten:
        batches = whiten(batches)
    return (batches, {}) if scores.old is None else correct(batches, scores.old, weight_cap)


def _advantages_by_token(
    batches: Sequence[Rows],
    plan: Plan,
    members: Sequence[Sequence[int]],
    rewards: Sequence[Sequence[float]],
    config: AdvantageConfig,
    loss: LossConfig,
    shaped: bool,
    scale: bool,
) -> None:
    """Write `advantage` (and `returns`) into the batches, from rewards less KL.

    The reward of token t is -kl_coef·KL_t, plus the episode's at its last token (Stiennon et al.
    2020, arXiv 2009.01325, section 3.4); group methods take the sum over the episode. What turns
    earned besides stays added.
    """
    slots = {example: (rows, row, at) for example, rows, row, at in slots_of(batches, plan)}
    for group, known in zip(members, rewards, strict=True):
        by_token = []
        for example, reward in zip(group, known, strict=True):
            rows, row, at = slots[example]
            steps = np.zeros(len(at))
            if shaped:
                ours, theirs = rows.old_logprob[row, at], rows.ref_logprob[row, at]
                steps -= loss.kl_coef * np.asarray(KL[loss.kl_estimator](ours, theirs))
            if len(at):
                steps[-1] += reward
            by_token.append(steps)
        if config.kind == "gae":
            for example, steps in zip(group, by_token, strict=True):
                rows, row, at = slots[example]
                values = rows.old_value[row, at]
                rows.advantage[row, at], rows.returns[row, at] = gae(
                    steps, values, config.gamma, config.lam
                )
            continue
        whole = [float(s.sum()) if len(s) else r for r, s in zip(known, by_token, strict=True)]
        before = outcome_advantages(known, config, scale)
        after = outcome_advantages(whole, config, scale)
        for example, old, new in zip(group, before, after, strict=True):
            rows, row, at = slots[example]
            rows.advantage[row, at] += new - old


def slots_of(batches: Sequence[Rows], plan: Plan) -> Iterator[tuple[int, Rows, int, np.ndarray]]:
    """For each planned example: its number, the microbatch and row that it lies in, and its used
    slots there, in order."""
    size = len(batches[0].tokens)
    for place, row_members in enumerate(plan):
        rows, row = batches[place // size], place % size
        segment = rows.segments[row]
        if rows.source is not None:
            segment = segment[rows.source[row]]
        used = rows.weight[row] > 0
        for number, example in enumerate(row_members, 1):
            yield example, rows, row, np.flatnonzero(used & (segment == number))


def whiten(batches: Sequence[Rows], eps: float = 1e-8) -> list[Rows]:
    """(A - mean) / (std + eps) over the policy tokens of all hosts; unused slots stay 0."""
    kept = [rows.advantage[rows.weight > 0].astype(np.float64) for rows in batches]
    here = np.concatenate(kept)
    sums = agree((len(here), float(here.sum()), float((here**2).sum())))
    count, first, second = (sum(host[i] for host in sums) for i in range(3))
    mean = first / max(count, 1)
    std = max(second / max(count, 1) - mean**2, 0.0) ** 0.5
    return [
        rows._replace(
            advantage=np.where(rows.weight > 0, (rows.advantage - mean) / (std + eps), 0.0).astype(
                np.float32
            )
        )
        for rows in batches
    ]
