"""The proof of a task: doing nothing fails it, the known fix passes it, as often as one likes."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.base import SandboxPool
from sandbox.task import Task
from sandbox.verdict import judge


@dataclass(frozen=True)
class Check:
    """What became of the two controls.

    Attributes:
      before: "fail" if every fail-to-pass test fails and every pass-to-pass test passes on the
        buggy tree, in every run; else what was seen instead.
      after: the verdict on the known fix: "pass" if it was that in every run.
      flips: the task fails before and passes after: it is sound.
      tests: how many tests it has; seconds: the longest of all its runs.
    """

    task: str
    before: str
    after: str
    flips: bool
    tests: int
    seconds: float


async def verify(task: Task, pool: SandboxPool, repeat: int = 1) -> Check:
    """Run both controls `repeat` times.

    Raises InputError when the task's release cannot be had or the bug does not fit it.
    """
    before, after, longest = "fail", "pass", 0.0
    for _ in range(repeat):
        async with pool.lease(task.tree()) as sandbox:
            report = await sandbox.run_tests((*task.fail_to_pass, *task.pass_to_pass))
        longest = max(longest, report.seconds)
        outcomes = {case.id: case.outcome for case in report.cases}
        well = [id for id in task.fail_to_pass if outcomes.get(id) not in ("failed", "error")]
        ill = [id for id in task.pass_to_pass if outcomes.get(id) != "passed"]
        if report.killed_by is not None:
            before = f"killed: {report.killed_by}"
        elif well or ill:
            id = (well + ill)[0]
            before = f"{id} is {outcomes.get(id, 'missing')}"
    for _ in range(repeat):
        verdict = await judge(task, task.gold_patch, pool)
        longest = max(longest, verdict.seconds)
        if verdict.verdict != "pass":
            after = verdict.verdict
    flips = before == "fail" and after == "pass"
    tests = len(task.fail_to_pass) + len(task.pass_to_pass)
    return Check(task.name, before, after, flips, tests, round(longest, 3))
