"""The proof of a task: doing nothing fails it, the known fix passes it, as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.base import SandboxBroken, SandboxPool, TestReport
from sandbox.failures import needs_network
from sandbox.image_task import NeedsImage
from sandbox.task import Task
from sandbox.verdict import judge


@dataclass(frozen=True)
class Check:
    """What became of the two controls.

    Attributes:
      before: "fail" if every fail-to-pass test fails and every pass-to-pass test passes on the
        buggy tree, in every run; else what was seen instead.
      after: "pass" if every test passes with the known fix, in every run; else what was seen.
      flips: the task fails before and passes after: it is sound.
      tests: how many tests it has; seconds: the longest of all its runs; runs: how many there were.
      digest: the task's (`Task.digest`): the same on every machine.
      refused: why it cannot be run here at all; "" if it was.
    """

    task: str
    before: str
    after: str
    flips: bool
    tests: int
    seconds: float
    runs: int
    digest: str
    refused: str = ""


async def verify(task: Task, pool: SandboxPool, repeat: int = 1, seed: int = 0) -> Check:
    """Run both controls `repeat` times: first in file order, then in random orders.

    Raises InputError when the task's release cannot be had or the bug does not fit it.
    """
    before, after, longest = "fail", "pass", 0.0
    tests = (*task.fail_to_pass, *task.pass_to_pass)
    try:
        tree = task.tree()
    except NeedsImage as error:
        return Check(
            task.name, "not run", "not run", False, len(tests), 0.0, 0, task.digest, str(error)
        )
    for time in range(repeat):
        order = seed + time if time else None
        try:
            async with pool.lease(tree) as sandbox:
                report = await sandbox.run_tests(tests, shuffle=order)
        except SandboxBroken as error:
            before = f"sandbox: {error}"
            continue
        longest = max(longest, report.seconds)
        before = _wrong(report, task.fail_to_pass, task.pass_to_pass) or before
    for time in range(repeat):
        verdict = await judge(task, task.gold_patch, pool, seed + time if time else None)
        longest = max(longest, verdict.seconds)
        if verdict.verdict != "pass":
            after = await _why(task, pool) or ", ".join((verdict.verdict, *verdict.flags))
    flips = before == "fail" and after == "pass"
    return Check(
        task.name, before, after, flips, len(tests), round(longest, 3), 2 * repeat, task.digest
    )


def _wrong(report: TestReport, to_fail: Sequence[str], to_pass: Sequence[str]) -> str:
    """The first thing that is not as it should be; "" if all is."""
    if report.killed_by is not None:
        return f"killed: {report.killed_by}"
    cases = {case.id: case for case in report.cases}
    for id in to_fail:
        if cases[id].outcome not in ("failed", "error"):
            return f"{id} is {cases[id].outcome}"
    for id in to_pass:
        if cases[id].outcome != "passed":
            reason = "it needs the network: " if needs_network(cases[id]) else ""
            error = f" ({reason}{cases[id].error})" if cases[id].error else ""
            return f"{id} is {cases[id].outcome}{error}"
    return ""


async def _why(task: Task, pool: SandboxPool) -> str:
    """Why the known fix does not pass: the first test that fails on the release itself."""
    tree = task.tree()
    fixed = type(tree)(tree.root, {}, tree.python_path)
    try:
        async with pool.lease(fixed) as sandbox:
            report = await sandbox.run_tests((*task.fail_to_pass, *task.pass_to_pass))
    except SandboxBroken:
        return ""
    return _wrong(report, (), (*task.fail_to_pass, *task.pass_to_pass))
