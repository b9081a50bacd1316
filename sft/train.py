"""Supervised fine-tuning on verified trajectories: next-token loss on what the teacher wrote."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from configs.errors import InputError, Preempted
from model.checkpoint import Checkpoints
from model.config import Qwen3Config
from model.hosts import agree, host_index
from model.preempt import noticed_by_any
from model.qwen3 import Params
from model.share import Share, share_of, spread
from sft.batches import ahead, input_of, share_of_batch
from sft.examples import Examples, Weigh
from sft.filling import fewest_rows
from sft.learner import Learner, OptimizerConfig, TrainState, nll
from sft.metrics import Metrics
from sft.packing import Example, plan_rows
from sft.stopping import History, SpikeConfig, ValidationConfig
from sft.tracking import Tracker


@dataclass(frozen=True)
class SFTConfig:
    """Attributes:
    epochs: passes over the trajectories.
    batch_rows, microbatch_rows: packed rows per update, and per gradient computation, over all
      hosts.
    row_tokens, row_targets: shape of a row; a trajectory must fit in one.
    weigh: what weighs the same in the loss, in an update: each token, or each turn or episode
      whatever its length.
    checkpoint_every: updates between checkpoints.
    """

    epochs: int = 3
    batch_rows: int = 16
    microbatch_rows: int = 8
    row_tokens: int = 1024
    row_targets: int = 512
    weigh: Weigh = "token"
    checkpoint_every: int = 20
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)


@dataclass(frozen=True)
class Speed:
    """How fast training is measured: FLOPs that the model asks for, for a token, and those that all
    devices can do in a second, None where that is not known."""

    token_flops: float
    peak_flops: float | None = None

    def of(self, tokens: float, seconds: float) -> dict[str, float]:
        """`time/*` metrics of an update."""
        done = tokens * self.token_flops / seconds
        found = {"time/tflops": done / 1e12}
        return found if self.peak_flops is None else found | {"time/mfu": done / self.peak_flops}


# (updates done, the policy) -> its success on held-out tasks
Success = Callable[[int, Params], Awaitable[float]]


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
    held_back: Sequence[Example] = (),
) -> Params:
    """`sft_loop` where no event loop runs, without episodes in between."""
    work = sft_loop(
        config,
        model,
        params,
        data,
        run,
        seed=seed,
        mesh=mesh,
        trackers=trackers,
        on_step=on_step,
        held_back=held_back,
    )
    return asyncio.run(work)


async def sft_loop(
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
    held_back: Sequence[Example] = (),
    success: Success | None = None,
    speed: Speed | None = None,
) -> Params:
    """Train from `params` on `data`, in the run folder `run`; resumes where it was cut off.

    The order of rows depends on `seed` and the epoch alone, so a resumed run sees the same batches
    and ends in the same bits; on another number of hosts the same but for rounding. `on_step` gets
    (updates done, updates in all, metrics). `held_back`: what validation losses are of. `success`:
    plays episodes of the policy; the weights it gets are good until it returns.

    Raises:
      InputError: no examples, one that does not fit a row, or losses that stay above the guard.
      Preempted: a host was told to stop; there is a checkpoint of the last update.
      CancelledError: it was cancelled, as by Ctrl-C; it goes on from the checkpoint before.
    """
    if not data:
        raise InputError(
            "SFT has no verified trajectory to train on: let the teacher try more tasks, or look "
            "at what teach.keep leaves out"
        )
    shape, rules = (config.row_tokens, config.row_targets), config.validation
    sizes = _sizes(data)
    plan = fewest_rows(sizes, *shape)
    order = _order(len(plan), config, seed)
    share = share_of(mesh)
    learner = Learner(
        model, config.optimizer.build(len(order)), nll, mesh, offload=config.optimizer.offload
    )
    validation = _Validation(learner, config, held_back, share) if held_back else None
    metrics = Metrics(run, trackers)
    checkpoints = Checkpoints(run / "checkpoints" / "sft", best=rules.best, background=True)
    state = learner.init(spread(params, model, mesh))
    del params  # the state has its own: a caller that keeps none frees a copy
    restored = checkpoints.restore_latest(state._asdict())
    if restored is not None:
        state = learner.place(TrainState(**restored))
    start = int(state.step)
    history = History(config.spikes, rules).read(metrics.read("sft", start))
    metrics.rewind("sft", start)
    batches = ahead(input_of(data, plan, order, config.microbatch_rows, share, *shape), start)
    began = time.monotonic()
    with contextlib.closing(batches):
        for step, own in enumerate(batches, start):
            if history.done:
                break
            if history.diverged:
                checkpoints.close()
                raise InputError(f"SFT: up to update {step} {history.trouble}")
            state, values = learner.step(state, own, history.limit)
            seconds = max(time.monotonic() - began, 1e-9)
            tokens = float(sum(sizes[i][0] for row in order[step] for i in plan[row]))
            values = {f"sft/{name}": value for name, value in values.items()}
            # the schedule counts the updates that were made
            values["sft/lr"] = float(config.optimizer.rate(len(order))(step - history.skipped))
            values |= {"sft/tokens": tokens, "time/tokens_per_s": tokens / seconds}
            if speed is not None:
                values |= speed.of(tokens, seconds)
            done, last = step + 1, step + 1 == len(order)
            score = None
            if validation is not None and rules.every and (done % rules.every == 0 or last):
                values["sft/validation_loss"] = loss = validation.loss(state.params)
                score = -loss if rules.best and np.isfinite(loss) else None
            if success is not None and rules.success_every and done % rules.success_every == 0:
                values["sft/heldout_success"] = await success(done, state.params)
            metrics.write("sft", done, values)
            history.see(values)
            stop = noticed_by_any() and not last
            if done % config.checkpoint_every == 0 or last or stop or score is not None:
                checkpoints.save(done, state._asdict(), score=score)
            on_step(done, len(order), values)
            if stop:
                checkpoints.close()
                raise Preempted(f"SFT has saved update {done} of {len(order)}")
            await asyncio.sleep(0)  # a Ctrl-C cancels this task, which takes effect here
            began = time.monotonic()
    best = checkpoints.best() if rules.best and validation is not None else None
    if best is not None and best != int(state.step):
        state = learner.place(TrainState(**checkpoints.restore(best, state._asdict())))
    checkpoints.close()
    return state.params


class _Validation:
    """The loss on what is held back, packed once."""

    def __init__(
        self, learner: Learner, config: SFTConfig, data: Sequence[Example], share: Share
    ) -> None:
        shape = config.row_tokens, config.row_targets
        plan = plan_rows(_sizes(data), *shape)
        self._learner, self._share = learner, share
        self._batches = share_of_batch(data, plan, config.microbatch_rows, share, *shape)

    def loss(self, params: Params) -> float:
        """Mean over the targets' weights of -log π, in nats; the same on all hosts."""
        total = weight = 0.0
        for rows in self._batches:
            logprobs = self._learner.logprobs(params, rows).astype(np.float64)
            total -= float((rows.weight * logprobs).sum())
            weight += float(rows.weight.sum())
        # hosts that feed the same rows count them once
        first = host_index() == min(self._share.peers)
        parts = agree([total, weight] if first else [0.0, 0.0])
        return sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1.0)


def _sizes(data: Sequence[Example]) -> list[tuple[int, int]]:
    return data.sizes if isinstance(data, Examples) else [example.size for example in data]


def _order(rows: int, config: SFTConfig, seed: int) -> list[np.ndarray]:
    """For each update, the indices of its rows: a new permutation each epoch."""
    batches = []
    for epoch in range(config.epochs):
        shuffled = np.random.default_rng([seed, epoch]).permutation(rows)
        batches += [shuffled[i : i + config.batch_rows] for i in range(0, rows, config.batch_rows)]
    return batches
