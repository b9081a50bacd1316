"""The SFT stage: which of the teacher's episodes, what is held back, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.lora import add_adapters, merged
from model.qwen3 import Params
from model.share import whole
from rl.evaluate import success
from rl.rollout import Episode
from rl.train import episode_seed
from sft.examples import Examples
from sft.filters import HeldOut
from sft.packing import Example
from sft.train import sft_loop
from sft.trajectory import Trajectory
from tools.progress import Report
from tools.speed import speed

if TYPE_CHECKING:
    from tools.pipeline import Pipeline


def examples(pipeline: Pipeline, taught: Sequence[Trajectory]) -> Examples:
    """What SFT learns from, of the teacher's episodes."""
    keep, heldout = pipeline.config.teach.keep, None
    if keep.heldout != "no":
        heldout = HeldOut(pipeline.heldout_tasks, packages=keep.heldout == "package")
    return Examples(taught, keep, heldout, pipeline.config.sft.weigh)


async def fine_tune(pipeline: Pipeline, taught: Sequence[Trajectory], report: Report) -> Params:
    """SFT from the starting policy on the teacher's episodes; its parameters, adapters unmerged."""
    config, model = pipeline.config.sft, pipeline.trained
    data = examples(pipeline, taught)
    held: Sequence[Example] = ()
    if config.validation.share:
        data, held = data.split(config.validation.share, pipeline.seed)
    devices = max(1, pipeline.config.mesh.devices)

    async def play(step: int, params: Params) -> float:
        """Success on some held-out tasks, one episode each."""
        tasks = (await pipeline.tasks("heldout"))[: config.validation.success_tasks]
        episodes = [
            Episode(task, episode_seed(pipeline.seed, 3, i, 0)) for i, task in enumerate(tasks)
        ]
        name = f"sft-{step:06d}"
        pipeline.engine.set_params(whole(merged(params, pipeline.config.lora)), 0)
        label = f"held out after {step}"
        done = await pipeline.record(name, episodes, pipeline.served(name), label, pipeline.setting)
        return success(done)["mean"]

    return await sft_loop(
        config,
        model,
        add_adapters(pipeline.take_start(), pipeline.config.lora, pipeline.seed),
        data,
        pipeline.run,
        seed=pipeline.seed,
        mesh=pipeline.mesh,
        trackers=pipeline.trackers,
        on_step=lambda n, of, m: report(n, of, f"loss {m['sft/loss']:.3f}"),
        held_back=held,
        success=play if config.validation.success_every else None,
        speed=speed(model, config.row_tokens, config.row_targets, data.sizes, devices),
    )
