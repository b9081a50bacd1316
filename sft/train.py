"""Supervised fine-tuning on verified trajectories: next-token loss on what the teacher wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError, Preempted
from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.preempt import noticed_by_any
from model.qwen3 import Params
from model.share import share_of, spread
from sft.batches import share_of_batch
from sft.examples import Examples
from sft.learner import Learner, OptimizerConfig, TrainState, nll
from sft.metrics import Metrics
from sft.packing import Example, plan_rows
from sft.tracking import Tracker


@dataclass(frozen=True)
class SFTConfig:
    """Attributes:
    epochs: passes over the trajectories.
    batch_rows, microbatch_rows: packed rows per update, and per gradient computation, over all
      hosts.
    row_tokens, row_targets: shape of a row; a trajectory must fit in one.
    checkpoint_every: updates between checkpoints.
    """

    epochs: int = 3
    batch_rows: int = 16
    microbatch_rows: int = 8
    row_tokens: int = 1024
    row_targets: int = 512
    checkpoint_every: int = 20
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def train_sft(
    config: SFTConfig,
    model: Qwen3Config,
    params: Params,
    data: Sequence[Example],
    run: Path,
    *,
    seed: int,
    mesh: Mesh | None = None,
    trackers: Sequence[Tracker] = (),
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """Train from `params` on `data`, in the run folder `run`; resumes where it was cut off.

    The order of rows depends on `seed` and the epoch alone, so a resumed run sees the same batches
    and ends in the same bits; on another number of hosts the same but for rounding. `on_step` gets
    (updates done, updates in all, metrics).

    Raises:
      InputError: no examples, or one that does not fit a row.
      Preempted: a host was told to stop; there is a checkpoint of the last update.
    """
    if not data:
        raise InputError(
            "SFT has no verified trajectory to train on: let the teacher try more tasks"
        )
    shape = config.row_tokens, config.row_targets
    sizes = data.sizes if isinstance(data, Examples) else [example.size for example in data]
    plan = plan_rows(sizes, *shape)
    order = _order(len(plan), config, seed)
    share = share_of(mesh)
    learner = Learner(
        model, config.optimizer.build(len(order)), nll, mesh, offload=config.optimizer.offload
    )
    metrics = Metrics(run, trackers)
    checkpoints = Checkpoints(run / "checkpoints" / "sft", background=True)
    state = learner.init(spread(params, model, mesh))
    del params  # the state has its own: a caller that keeps none frees a copy
    restored = checkpoints.restore_latest(state._asdict())
    if restored is not None:
        state = learner.place(TrainState(**restored))
    start = int(state.step)
    metrics.rewind("sft", start)
    for step in range(start, len(order)):
        began = time.monotonic()
        batch = [plan[row] for row in np.sort(order[step])]
        own = share_of_batch(data, batch, config.microbatch_rows, share, *shape)
        state, values = learner.step(state, own)
        tokens = float(sum(sizes[i][0] for row in batch for i in row))
        values = {f"sft/{name}": value for name, value in values.items()}
        values["sft/lr"] = float(config.optimizer.rate(len(order))(step))
        values |= {"sft/tokens": tokens, "time/tokens_per_s": tokens / (time.monotonic() - began)}
        metrics.write("sft", step + 1, values)
        stop = noticed_by_any() and step + 1 < len(order)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == len(order) or stop:
            checkpoints.save(step + 1, state._asdict())
        on_step(step + 1, len(order), values)
        if stop:
            checkpoints.close()
            raise Preempted(f"SFT has saved update {step + 1} of {len(order)}")
    checkpoints.close()
    return state.params


def _order(rows: int, config: SFTConfig, seed: int) -> list[np.ndarray]:
    """For each update, the indices of its rows: a new permutation each epoch."""
    batches = []
    for epoch in range(config.epochs):
        shuffled = np.random.default_rng([seed, epoch]).permutation(rows)
        batches += [shuffled[i : i + config.batch_rows] for i in range(0, rows, config.batch_rows)]
    return batches
