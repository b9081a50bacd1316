"""Whether a mutation makes a task: its tests run on the broken tree and on the release.

What does not depend on the mutation is seen once. The tests of one function run together on the
release before its first mutation (`steady`), those of several again and again (`rehearse`), and
each selection of them that tasks name once, however many tasks name it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.base import Sandbox, TestReport, Tree
from sandbox.packages import Package

MAX_FAIL_TO_PASS, MAX_PASS_TO_PASS = 12, 12
DEADLINE_S, REHEARSAL_S = 3.0, 60.0  # of wall time
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

    `repeat`: how often each test of a task is seen to do what it should on either tree, at least
    once of them among that task's tests alone.
    """

    def __init__(self, package: Package, sandbox: Sandbox, repeat: int) -> None:
        self._package = package
        self._sandbox = sandbox
        self._repeat = repeat
        self._pristine = Tree(package.tree, {}, package.python_path)
        self._passes: Counter[str] = Counter()  # on the release, by test
        self._wavering: set[str] = set()  # tests that did not pass there
        self._passing: dict[frozenset[str], TestReport | None] = {}

    async def steady(self, tests: Sequence[str], times: int) -> list[str] | None:
        """Those of the tests that pass on the release, together, and `times` times in all (runs
        seen before count); None if they take too long."""
        good = [id for id in tests if id not in self._wavering]
        while good and not (
            frozenset(good) in self._passing and min(self._passes[id] for id in good) >= times
        ):
            await self._sandbox.reset(self._pristine)
            report = await self._run(good, MAX_RUN_S)
            if not _ended(report) or report.cpu_s > MAX_RUN_S:
                return None
            self._count(report)
            if report.passed(good):
                self._passing[frozenset(good)] = report
            good = [id for id in good if id not in self._wavering]
        return good

    async def rehearse(self, tests: Sequence[str]) -> None:
        """Run tests of several functions together on the release, which is quicker, until each has
        been seen there often enough; after a run that does not end by itself, no more."""
        await self._sandbox.reset(self._pristine)
        for round in range(self._repeat):
            few = [id for id in tests if self._passes[id] < self._repeat]
            few = [id for id in few if id not in self._wavering]
            if not few:
                return
            order = round or None  # the first in file order, then in random ones
            report = await self._sandbox.run_tests(few, timeout_s=REHEARSAL_S, shuffle=order)
            if not _ended(report):
                return
            self._count(report)

    def _count(self, report: TestReport) -> None:
        """Note what a run on the release says of its tests."""
        for case in report.cases:
            if case.outcome == "passed":
                self._passes[case.id] += 1
            else:
                self._wavering.add(case.id)

    async def prove(
        self, module: str, buggy: bytes, tests: Sequence[str], neighbours: Sequence[str]
    ) -> Proven | None:
        """The task that `module` with the contents `buggy` makes; None if it makes none.

        `tests` and `neighbours` are steady; all `neighbours` that pass with the bug are kept.
        """
        await self._sandbox.reset(
            Tree(self._package.tree, {module: buggy}, self._package.python_path)
        )
        first = await self._run([*tests, *neighbours], 2 * MAX_RUN_S)
        if not _ended(first) or not any(case.outcome == "failed" for case in first.cases):
            return None
        failing = [case.id for case in first.cases if case.outcome in ("failed", "error")]
        passing = [case.id for case in first.cases if case.outcome == "passed"]
        # short names first: the instruction shows a few of them
        f2p = sorted(failing, key=lambda id: (len(id), id))[:MAX_FAIL_TO_PASS]
        own = [id for id in passing if id not in neighbours][:MAX_PASS_TO_PASS]
        p2p = own + [id for id in passing if id in neighbours]
        slowest = 0.0
        for round in range(1, self._repeat):  # the first run was one of them
            # the last in a random order: state that a bug leaves behind hits other tests then
            order = round if round == self._repeat - 1 else None
            before = await self._run(f2p + p2p, MAX_RUN_S, order)
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
            report = await self._run(tests, MAX_RUN_S)
            good = report.passed(tests) and report.cpu_s <= MAX_RUN_S
            self._passing[key] = report if good else None
        return self._passing[key]

    async def _run(
        self, tests: Sequence[str], cpu_s: float, shuffle: int | None = None
    ) -> TestReport:
        return await self._sandbox.run_tests(
            tests, timeout_s=DEADLINE_S, shuffle=shuffle, cpu_s=cpu_s
        )


def _ended(report: TestReport) -> bool:
    """The run ended by itself and every test was seen."""
    seen = all(case.outcome != "missing" for case in report.cases)
    return seen and not report.timed_out and report.killed_by is None
