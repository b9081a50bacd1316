"""Many episodes at once, in a fixed order, interruptible and resumable."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, Preempted
from configs.files import append_jsonl
from model.hosts import agree, barrier, exists, host_count, host_index
from model.preempt import unless_noticed
from rl.agent import AgentConfig, Policy, run_episode
from sandbox.base import SandboxBroken, SandboxPool
from sandbox.environments import SIMPLIFIED, Setting
from sandbox.task import Task
from sft.chat import Renderer
from sft.endpoint import OutOfBudget
from sft.trajectory import Stored, Trajectory, load, save, to_record

TRIES = 4


@dataclass(frozen=True)
class Episode:
    """What identifies an episode: the same task and seed give the same episode."""

    task: Task
    seed: int


async def run_whole(
    episode: Episode,
    policy: Policy,
    pool: SandboxPool,
    renderer: Renderer,
    config: AgentConfig,
    setting: Setting = SIMPLIFIED,
) -> Trajectory:
    """One episode, again while its sandbox breaks, at most `TRIES` times: the same task and seed,
    and what broke is not counted.

    If it breaks each time, the task's tests are run without it. Where that works, the episode is
    the cause: it ends with the verdict "error", and earns nothing. Else SandboxBroken is raised.
    """
    for attempt in range(TRIES):
        try:
            done = await run_episode(
                episode.task, policy, pool, renderer, config, episode.seed, setting
            )
        except SandboxBroken:
            if attempt + 1 == TRIES:
                raise
            continue
        if done.verdict["verdict"] != "error":
            return done
    async with pool.lease(episode.task.tree()) as sandbox:
        await sandbox.run_tests(episode.task.fail_to_pass)
    return done


async def run_episodes(
    episodes: Sequence[Episode],
    policy: Policy,
    pool: SandboxPool,
    renderer: Renderer,
    config: AgentConfig,
    *,
    concurrency: int,
    setting: Setting = SIMPLIFIED,
    on_done: Callable[[Trajectory], None] = lambda _: None,
) -> list[Trajectory]:
    """Run all episodes, `concurrency` at a time; results come in the order of `episodes`.

    Any failure of the harness that `run_whole` raises cancels the rest and is raised. Once an
    episode cannot begin for want of budget no more are begun; they are left out.
    """
    gate = asyncio.Semaphore(concurrency)
    spent = False

    async def one(episode: Episode) -> Trajectory | None:
        nonlocal spent
        async with gate:
            if spent:
                return None
            try:
                done = await run_whole(episode, policy, pool, renderer, config, setting)
            except OutOfBudget:
                spent = True
                return None
        on_done(done)
        return done

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(one(episode)) for episode in episodes]
    finished = [task.result() for task in running]
    return [done for done in finished if done is not None]


async def run_to_file(
    path: Path,
    episodes: Sequence[Episode],
    policy: Policy,
    pool: SandboxPool,
    renderer: Renderer,
    config: AgentConfig,
    *,
    concurrency: int,
    setting: Setting = SIMPLIFIED,
    on_done: Callable[[Trajectory], None] = lambda _: None,
    partly: bool = False,
) -> Stored:
    """Like `run_episodes`, kept in `path`: finished episodes survive a kill and are not run again.

    While under way they are in `path.partial`, or, where several hosts share them out, in one such
    file of each; `path` itself only ever holds the whole set. `partly`: those that there was budget
    for are the whole set, the ones that it cut short among them; else these are run again.

    Raises Preempted if a host was told to stop, InputError if the budget did not last.
    """
    if exists(path):
        return Stored(path)
    partial = path.with_name(path.name + ".partial")
    if host_count() > 1:
        partial = path.with_name(f"{path.name}.host-{host_index()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    # what the last hosts left, however many they were
    done = {key: t for key, t in _left_over(path).items() if partly or t.stop != "budget"}
    barrier(f"{path} taken up")

    def keep(trajectory: Trajectory) -> None:
        append_jsonl(partial, to_record(trajectory))
        on_done(trajectory)

    for trajectory in done.values():
        on_done(trajectory)
    todo = [e for e in episodes if (e.task.name, e.seed) not in done]
    own = todo[host_index() :: host_count()]
    running = run_episodes(
        own,
        policy,
        pool,
        renderer,
        config,
        concurrency=concurrency,
        setting=setting,
        on_done=keep,
    )
    fresh = await unless_noticed(running)
    stood = [t for t in fresh or [] if partly or t.stop != "budget"]
    missing = agree(None if fresh is None else len(own) - len(stood))
    if None in missing:
        raise Preempted(f"the episodes that are done are in {partial.parent}")
    if sum(missing) and not partly:
        raise InputError(
            f"the budget lasted for {len(episodes) - sum(missing)} of {len(episodes)} episodes, "
            f"which are kept in {partial.parent}: the same command goes on with more "
            "teach.endpoint.budget, or without the rest with teach.endpoint.when_spent=train"
        )
    if host_index() == 0:
        done = _left_over(path)
        keys = [(e.task.name, e.seed) for e in episodes]
        save(path, [done[key] for key in keys if key in done])
        for left in _partials(path):
            left.unlink()
    barrier(f"{path} whole")
    return Stored(path)


def _partials(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.*partial"))


def _left_over(path: Path) -> dict[tuple[str, int], Trajectory]:
    """The finished episodes of an unfinished set, by task and seed; one that was run again stands
    for the one that the budget cut short."""
    found = [t for partial in _partials(path) for t in load(partial)]
    found.sort(key=lambda t: t.stop != "budget")  # stable: of two the later stands
    return {(t.task, t.seed): t for t in found}
