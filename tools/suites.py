"""The whole suites of releases, measured ahead of the work that needs them, with progress."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from configs.errors import InputError
from sandbox.base import SandboxPool
from sandbox.checks import checks_of
from sandbox.task import Task
from tools.progress import progress


async def judged_in_full(tasks: Sequence[Task], pool: SandboxPool, jobs: int) -> list[Task]:
    """Those of `tasks`, in order, that the full environment can judge; the suites of their releases
    are known from then on. The others are told, each with the reason, on standard error.

    Raises InputError if there are tasks, and it can judge none.
    """
    gate = asyncio.Semaphore(jobs)
    reasons: dict[str, str] = {}
    with progress("suites") as report:
        done = 0

        async def one(task: Task) -> None:
            nonlocal done
            async with gate:
                try:
                    await checks_of(task, pool, "full")
                except InputError as error:
                    reasons[task.name] = str(error)
            done += 1
            report(done, len(tasks), task.package)

        # tasks of one release wait for its suite, so its others shall not fill all places
        await asyncio.gather(*(one(task) for task in _in_turn(tasks)))
    for name, reason in sorted(reasons.items()):
        print(f"remend: {name} is left out: {reason}", file=sys.stderr)
    kept = [task for task in tasks if task.name not in reasons]
    if tasks and not kept:
        raise InputError(f"no task can be judged in the full environment: {min(reasons.values())}")
    return kept


def _in_turn(tasks: Sequence[Task]) -> list[Task]:
    """One task of each release, then a second one of each, …"""
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for task in tasks:
        key = (task.package, task.version)
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], task))
    return [task for _, task in sorted(ranked, key=lambda item: item[0])]
