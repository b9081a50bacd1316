"""Pre-training of a tiny policy: from random weights to one that knows the format and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.copying import copying_init
from model.qwen3 import Params
from sft.learner import Learner, OptimizerConfig, TrainState, nll
from sft.metrics import Metrics
from sft.packing import microbatches
from sft.pretrain_rows import RowsAhead, RowsConfig, StepRows
from sft.synthetic import MixConfig


@dataclass(frozen=True)
class PretrainConfig(RowsConfig):
    """Attributes:
    start: a Hugging Face folder to go on from, weights and tokenizer; empty: from scratch.
    libraries: installed packages, by import name, whose functions are learnt from as well.
    tokenizer_functions: functions that the tokenizer is trained on, drawn at random.
    steps: updates, each of `batch_rows` packed rows of `row_tokens`.
    """

    model: Qwen3Config = field(kw_only=True)
    start: str = ""
    devices: int = 1
    vocab_size: int = 4096
    libraries: tuple[str, ...] = ()
    tokenizer_functions: int = 4000
    steps: int = 2400
    checkpoint_every: int = 200
    mix: MixConfig = field(default_factory=MixConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def pretrain(
    config: PretrainConfig,
    source: StepRows | RowsAhead,
    run: Path,
    *,
    seed: int,
    start: Params | None = None,
    mesh: Mesh | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """Train on the rows of `source`, from `start` or else from scratch; resumes where it was cut
    off."""
    learner = Learner(config.model, config.optimizer.build(config.steps), nll, mesh)
    metrics = Metrics(run)
    checkpoints = Checkpoints(run / "checkpoints" / "pretrain")
    state = learner.init(copying_init(config.model, seed) if start is None else start)
    restored = checkpoints.restore_latest(state._asdict())
    if restored is not None:
        state = learner.place(TrainState(**restored))
    metrics.rewind("pretrain", int(state.step))
    first = int(state.step)
    began = time.monotonic()
    for step, batch in enumerate(source.between(first, config.steps), first):
        state, values = learner.step(state, microbatches(batch, config.batch_rows))
        tokens = float((batch.segments > 0).sum())
        values = {f"pretrain/{name}": value for name, value in values.items()}
        values |= {"pretrain/tokens": tokens}
        now = time.monotonic()
        values |= {"time/tokens_per_s": tokens / (now - began)}
        began = now
        metrics.write("pretrain", step + 1, values)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoints.save(step + 1, state._asdict())
        on_step(step + 1, config.steps, values)
    checkpoints.close()
    return jax.tree.map(np.asarray, state.params)
