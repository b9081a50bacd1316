"""The RL stage: which loop, over which policy server, and how weights get to it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.hosts import barrier, beside, host_count, host_index
from model.lora import add_adapters, merged
from model.qwen3 import Params
from rl.policy_server import PolicyServer
from rl.probe import Probe, Prober
from rl.reward import UNGUARDED, paid
from rl.rollout import Episode, run_whole
from rl.serving import open_server
from rl.snapshot import Snapshot, Snapshots
from rl.train import train_rl
from rl.train_ahead import train_ahead
from sandbox.task import Task
from sft.trajectory import Trajectory
from tools.progress import Report

if TYPE_CHECKING:
    from tools.pipeline import Pipeline


async def reinforce(
    pipeline: Pipeline, start: Params, tasks: Sequence[Task], report: Report
) -> Params:
    """GRPO from `start` on `tasks`, with the servers that the config names; the final parameters,
    adapters unmerged."""
    config = pipeline.config
    if not config.reward.guard:
        print(f"WARNING: {UNGUARDED}", file=sys.stderr, flush=True)
    policy = _policy_server(pipeline)
    snapshots = _snapshots(pipeline)
    remote = config.server.kind != "inprocess"
    prober = Prober(pipeline.trained, pipeline.mesh) if remote else None

    def probe(params: Params, version: int) -> Probe | None:
        return prober(params, version) if prober is not None else None

    def copy(params: Params, version: int) -> tuple[Params, Probe | None]:
        probed = probe(params, version)  # first: it refuses weights that are no numbers
        return snapshots.copy(merged(params, config.lora)), probed

    def write(copied: tuple[Params, Probe | None], version: int) -> tuple[Snapshot, Probe | None]:
        with beside("snapshots"):
            return snapshots.write(copied[0], version), copied[1]

    gate = asyncio.Semaphore(config.server.slots)

    async def roll(episode: Episode) -> Trajectory:
        async with gate:
            done = await run_whole(
                episode,
                policy,
                pipeline.pool,
                pipeline.renderer,
                config.agent,
                pipeline.setting,
            )
        return paid([done], config.reward)[0]

    async def publish(params: Params, version: int) -> None:
        probed = probe(params, version)
        snapshot = snapshots.write(merged(params, config.lora), version)
        shared = host_count() > 1 and bool(config.server.sglang.urls)
        if shared and host_index() > 0:
            barrier(f"version {version} published")  # by the first host: the others find it there
        await policy.publish(snapshot, probed)
        if shared and host_index() == 0:
            barrier(f"version {version} published")

    async def rollout(episodes: Sequence[Episode]) -> list[Trajectory]:
        return paid(await pipeline.run_episodes(episodes, policy), config.reward)

    def on_step(done: int, of: int, values: dict[str, float]) -> None:
        report(done, of, f"success {values['rl/success']:.2f}")

    params = add_adapters(start, config.lora, pipeline.seed + 1)
    try:
        if config.rl.max_staleness:
            return await train_ahead(
                config.rl,
                pipeline.trained,
                params,
                tasks,
                pipeline.run,
                seed=pipeline.seed,
                temperature=config.agent.temperature,
                roll=roll,
                copy=copy,
                write=write,
                serve=lambda made: policy.publish(*made),
                mesh=pipeline.mesh,
                server_metrics=policy.metrics,
                trackers=pipeline.trackers,
                on_step=on_step,
            )
        return await train_rl(
            config.rl,
            pipeline.trained,
            params,
            tasks,
            pipeline.run,
            seed=pipeline.seed,
            temperature=config.agent.temperature,
            rollout=rollout,
            publish=publish,
            mesh=pipeline.mesh,
            server_metrics=policy.metrics,
            trackers=pipeline.trackers,
            on_step=on_step,
        )
    finally:
        await policy.close()


def _policy_server(pipeline: Pipeline) -> PolicyServer:
    config = pipeline.config
    server = config.server
    if server.kind == "inprocess":
        return pipeline.served("rl")
    return open_server(
        server.kind,
        server.sglang,
        pipeline.start.config,
        "rl",
        stop_ids=pipeline.stop_ids,
        temperature=config.agent.temperature,
        lag=config.rl.max_staleness,
        slots=server.slots,
        max_tokens=config.agent.max_tokens,
        logs=pipeline.run / "server",
        say=lambda text: print(f"server: {text}", file=sys.stderr, flush=True),
    )


def _snapshots(pipeline: Pipeline) -> Snapshots:
    config, start = pipeline.config, pipeline.start
    server = config.server.sglang
    return Snapshots(
        pipeline.run / "snapshots",
        start.config,
        start.tokenizer,
        # ahead: what servers have, what they load, what waits for them
        keep=3 if config.rl.max_staleness else 2,
        dtype=server.snapshot_dtype,
        budget_bytes=int(server.snapshot_gib * 2**30),
    )
