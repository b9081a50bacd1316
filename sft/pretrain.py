"""Pre-training of a tiny policy: from random weights to one that knows the format and copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.copying import copying_init
from model.qwen3 import Params
from sft.chat import Renderer
from sft.learner import Learner, OptimizerConfig, TrainState, nll
from sft.metrics import Metrics
from sft.packing import Example, microbatches, pack
from sft.synthetic import Function, MixConfig, RepairEpisodes


@dataclass(frozen=True)
class PretrainConfig:
    """Attributes:
    start: a Hugging Face folder to go on from, weights and tokenizer; empty: from scratch.
    libraries: installed packages, by import name, whose functions are learnt from as well.
    tokenizer_functions: functions that the tokenizer is trained on, drawn at random.
    steps: updates, each of `batch_rows` packed rows of `row_tokens`.
    """

    model: Qwen3Config
    start: str = ""
    devices: int = 1
    vocab_size: int = 4096
    libraries: tuple[str, ...] = ()
    tokenizer_functions: int = 4000
    steps: int = 2400
    batch_rows: int = 8
    row_tokens: int = 768
    row_targets: int = 384
    checkpoint_every: int = 200
    mix: MixConfig = field(default_factory=MixConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def pretrain(
    config: PretrainConfig,
    functions: Sequence[Function],
    renderer: Renderer,
    run: Path,
    *,
    seed: int,
    start: Params | None = None,
    mesh: Mesh | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
) -> Params:
    """Train on synthetic episodes over `functions`, from `start` or else from scratch; resumes
    where it was cut off."""
    learner = Learner(config.model, config.optimizer.build(config.steps), nll, mesh)
    metrics = Metrics(run)
    checkpoints = Checkpoints(run / "checkpoints" / "pretrain")
    state = learner.init(copying_init(config.model, seed) if start is None else start)
    restored = checkpoints.restore_latest(state._asdict())
    if restored is not None:
        state = learner.place(TrainState(**restored))
    metrics.rewind("pretrain", int(state.step))
    for step in range(int(state.step), config.steps):
        began = time.monotonic()
        rows = pack(_batch(config, functions, renderer, seed, step), *_shape(config))
        full = np.argsort(-(rows.segments > 0).sum(axis=1), kind="stable")[: config.batch_rows]
        batch = rows.select(np.sort(full))
        state, values = learner.step(state, microbatches(batch, config.batch_rows))
        tokens = float((batch.segments > 0).sum())
        values = {f"pretrain/{name}": value for name, value in values.items()}
        values |= {"pretrain/tokens": tokens}
        values |= {"time/tokens_per_s": tokens / (time.monotonic() - began)}
        metrics.write("pretrain", step + 1, values)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoints.save(step + 1, state._asdict())
        on_step(step + 1, config.steps, values)
    checkpoints.close()
    return jax.tree.map(np.asarray, state.params)


def _shape(config: PretrainConfig) -> tuple[int, int]:
    return config.row_tokens, config.row_targets


def _batch(
    config: PretrainConfig,
    functions: Sequence[Function],
    renderer: Renderer,
    seed: int,
    step: int,
) -> list[Example]:
    """Enough examples for one update; a function of (seed, step), so that a resumed run agrees."""
    episodes = RepairEpisodes(functions, renderer, seed * 1_000_003 + step, config.mix)
    wanted = config.batch_rows * config.row_tokens * 11 // 10
    found: list[Example] = []
    while sum(len(e.ids) for e in found) < wanted:
        example = episodes.example()
        targets = sum(1 for w in example.weight if w)
        if len(example.ids) <= config.row_tokens and targets <= config.row_targets:
            found.append(example)
    return found
