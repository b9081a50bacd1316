"""Whether a mutation makes a task: its tests run on the broken tree and on the release.

What does not depend on the mutation is seen once: all tests of a function run together on the
release before its first mutation (`steady`), and each selection of them that tasks name runs there
once, however many tasks name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.base import Sandbox, TestReport, Tree
from sandbox.packages import Package

MAX_FAIL_TO_PASS, MAX_PASS_TO_PASS = 12, 12
DEADLINE_S = 3.0  # of wall time
# A run's CPU time. Four runs make a task: slower ones would take more than a second for each.
MAX_RUN_S = 0.25


@dataclass(frozen=True)
class Proven:
    """The tests of a task, and the longest run of them in seconds of wall time."""

    fail_to_pass: list[str]
    pass_to_pass: list[str]
    seconds: float


class Trials:
    """Mutations of one package, tried one after another in one sandbox.

    `repeat`: how often each test of a task is seen to fail or pass on either tree, at least.
    """

    def __init__(self, package: Package, sandbox: Sandbox, repeat: int) -> None:
        self._package = package
        self._sandbox = sandbox
        self._repeat = repeat
        self._pristine = Tree(package.tree, {}, package.python_path)
        self._passing: dict[frozenset[str], TestReport | None] = {}

    async def steady(self, tests: Sequence[str]) -> list[str] | None:
        """Those of the tests that pass together on the release, every time, at least once; None if
        they take too long."""
        await self._sandbox.reset(self._pristine)
        good = list(tests)
        for _ in range(max(1, self._repeat - 1)):  # the run of a task's own tests is one more
            if not good:
                break
            report = await self._run(good)
            if not _ended(report) or report.cpu_s > MAX_RUN_S:
                return None
            good = [case.id for case in report.cases if case.outcome == "passed"]
        return good

    async def prove(
        self, module: str, buggy: bytes, tests: Sequence[str], neighbours: Sequence[str]
    ) -> Proven | None:
        """The task that `module` with the contents `buggy` makes; None if it makes none.

        `tests` and `neighbours` are steady; all `neighbours` that pass with the bug are kept.
        """
        await self._sandbox.reset(
            Tree(self._package.tree, {module: buggy}, self._package.python_path)
        )
        first = await self._run([*tests, *neighbours])
        if not _ended(first) or not any(case.outcome == "failed" for case in first.cases):
            return None
        failing = [case.id for case in first.cases if case.outcome in ("failed", "error")]
        passing = [case.id for case in first.cases if case.outcome == "passed"]
        # short names first: the instruction shows a few of them
        f2p = sorted(failing, key=lambda id: (len(id), id))[:MAX_FAIL_TO_PASS]
        own = [id for id in passing if id not in neighbours][:MAX_PASS_TO_PASS]
        p2p = own + [id for id in passing if id in neighbours]
        slowest = 0.0
        for _ in range(self._repeat - 1):  # the first run was one of them
            before = await self._run(f2p + p2p)
            if not _ended(before) or before.cpu_s > MAX_RUN_S or not before.passed(p2p):
                return None
            if any(case.outcome not in ("failed", "error") for case in before.cases[: len(f2p)]):
                return None
            slowest = max(slowest, before.seconds)
        after = await self._after(f2p + p2p)
        if after is None:
            return None
        return Proven(f2p, p2p, max(slowest, after.seconds))

    async def _after(self, tests: list[str]) -> TestReport | None:
        """The run of a task's tests on the release; None unless all pass, and in time."""
        key = frozenset(tests)  # they run in file order
        if key not in self._passing:
            await self._sandbox.reset(self._pristine)
            report = await self._run(tests)
            good = report.passed(tests) and report.cpu_s <= MAX_RUN_S
            self._passing[key] = report if good else None
        return self._passing[key]

    async def _run(self, tests: Sequence[str]) -> TestReport:
        # one that is over MAX_RUN_S is told as such: a bug may make tests slower, if not endless
        return await self._sandbox.run_tests(tests, timeout_s=DEADLINE_S, cpu_s=2 * MAX_RUN_S)


def _ended(report: TestReport) -> bool:
    """The run ended by itself and every test was seen."""
    seen = all(case.outcome != "missing" for case in report.cases)
    return seen and not report.timed_out and report.killed_by is None
