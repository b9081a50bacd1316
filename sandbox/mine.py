"""Real bugs: what the tests of a release find in the release before it.

For two adjacent releases: run the newer one's tests on it, run those that pass on the newer tree
with the older source, see which failures are bugs, take the source diff apart into independent
fixes, and prove each. What a pair gave, or why it gave nothing, is one record.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from configs.errors import InputError
from sandbox.base import Sandbox, SandboxBroken, TestCase, Tree
from sandbox.coverage import Coverage, coverage
from sandbox.failures import kind, looks_at_clock
from sandbox.hunks import Hunk, digest, hunks_between, source_files, take_back
from sandbox.local import LocalPool
from sandbox.mined import Mined, ranges
from sandbox.packages import Package
from sandbox.patch import make_patch
from sandbox.prove import prove
from sandbox.shipped import group
from sandbox.source import OUTSIDE, Code, FunctionSpan
from sandbox.split import ddmin, same_tests, split


@dataclass(frozen=True)
class MineLimits:
    """How much of a pair is looked at, and what a task may be."""

    suite_s: float = 240.0
    test_s: float = 1.0
    tests_s: float = 10.0
    tests: int = 6000
    hunks: int = 400
    split_runs: int = 240
    split_s: float = 60.0
    pieces: int = 24
    pieces_s: float = 150.0
    grow_runs: int = 24
    fail_to_pass: int = 10
    pass_to_pass: int = 24
    id_chars: int = 120
    run_s: float = 8.0
    repeat: int = 3


@dataclass
class PairRecord:
    """What became of one pair. `status`: "tasks", "none" (valid, but no task) or "refused" (it
    could not be looked at); `reason` says why. `kinds` counts the failing tests by what they say;
    `pieces` the independent fixes found, kept and not; `dropped` the tests not relied upon."""

    package: str
    old: str
    version: str
    status: str = "refused"
    reason: str = ""
    passing: int = 0
    hunks: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


async def mine_pair(
    new: Package, old: Package, uploaded: str, limits: MineLimits, pool: LocalPool
) -> PairRecord:
    """Mine one pair; both trees must be in the cache. Never raises for what a release holds."""
    record = PairRecord(new.name, old.version, new.version)
    began = time.monotonic()
    try:
        await _Pair(new, old, uploaded, limits, record).mine(pool)
    except (InputError, SandboxBroken, UnicodeError, RecursionError) as error:
        record.status, record.reason = "refused", str(error)[:300]
    record.seconds = round(time.monotonic() - began, 1)
    return record


class _CutShort(InputError):
    """A test run that did not reach every test."""


@dataclass
class _Suite:
    """Tests of a pair: those that pass on the newer source, those of them that fail on the older,
    and which of those show bugs. `told`: the bugs, by the tests that show them, that are tasks.
    `more`: pieces that make tests fail otherwise than the older release does, and those tests."""

    passing: list[str]
    broken: set[str]
    bugs: list[str]
    measured: Coverage
    told: set[frozenset[str]] = field(default_factory=set)
    more: dict[tuple[Hunk, ...], set[str]] = field(default_factory=dict)


class _Pair:
    def __init__(
        self, new: Package, old: Package, uploaded: str, limits: MineLimits, record: PairRecord
    ) -> None:
        self.new, self.old, self.uploaded = new, old, uploaded
        self.limits, self.record = limits, record
        self.fixed = Tree(new.tree, {}, new.python_path)
        self.versions = (new.version, old.version)
        self._patience_s = limits.suite_s  # with one run of tests

    async def mine(self, pool: LocalPool) -> None:
        new_files, old_files = source_files(self.new), source_files(self.old)
        self.new_files, self.old_files = new_files, old_files
        if not new_files.keys() & old_files.keys():
            raise InputError("the modules have moved: no file in common")
        hunks = hunks_between(new_files, old_files, self.versions)
        self.record.hunks = len(hunks)
        if not hunks:
            self.record.status, self.record.reason = "none", "no change in the source"
            return
        if len(hunks) > self.limits.hunks:
            raise InputError(f"{len(hunks)} hunks: more than a fix")
        measured = await coverage(self.new, pool.backend, self.limits.suite_s)
        passing = self._quick(measured.seconds)
        self.record.passing = len(passing)
        if len(passing) < 3:
            raise InputError(f"{len(passing)} of {measured.not_passed + len(passing)} tests pass")
        if len(passing) > self.limits.tests:
            raise InputError(f"{len(passing)} tests: too many")
        async with pool.lease(self.fixed) as sandbox:
            await self._mine(sandbox, hunks, passing, measured)

    def _quick(self, seconds: Mapping[str, float]) -> list[str]:
        """The tests that can be used, but for the slowest: they run dozens of times for a pair, and
        a sandbox is to answer at once."""
        usable = [id for id in seconds if self._usable(id) and seconds[id] <= self.limits.test_s]
        total, kept = 0.0, set()
        for id in sorted(usable, key=lambda id: seconds[id]):
            total += seconds[id]
            if total <= self.limits.tests_s:
                kept.add(id)
        return [id for id in usable if id in kept]

    async def _mine(
        self, sandbox: Sandbox, hunks: list[Hunk], passing: list[str], measured: Coverage
    ) -> None:
        # the suite again, with the runner that tasks are judged by; a test must pass here, too
        began = time.monotonic()
        again = await self._cases(sandbox, [], passing)
        self._patience_s = min(self.limits.suite_s, 10 + 5 * (time.monotonic() - began))
        passing = [id for id in passing if again[id].outcome == "passed"]
        cases = await self._cases(sandbox, hunks, passing)
        broken = {id for id, case in cases.items() if case.outcome != "passed"}
        bugs = [id for id in sorted(broken) if self._kind(cases[id]) == "bug"]
        if not broken:
            self.record.status, self.record.reason = "none", "the older source passes all tests"
            return
        if len(broken) == len(passing) or not bugs:
            why = "every test" if len(broken) == len(passing) else "no test shows a bug; it"
            self.record.status = "none"
            self.record.reason = f"{why} fails on the older source: {self.record.kinds}"
            return
        suite = _Suite(passing, broken, bugs, measured)
        rows = await self._fixes(sandbox, hunks, suite)
        whole = await self._task(sandbox, tuple(hunks), hunks, suite)
        rows += [whole] if whole is not None else []
        self.record.tasks = [row.record() for row in rows]
        self.record.status = "tasks" if rows else "none"
        self.record.reason = "" if rows else "no piece of the diff held in the proof"

    async def _fixes(self, sandbox: Sandbox, hunks: list[Hunk], suite: _Suite) -> list[Mined]:
        """The tasks of the independent fixes: first of those that hold as they are, then of those
        that take others along, which is dear, until the time for a pair is up."""
        rows: list[Mined] = []
        coupled: list[tuple[Hunk, ...]] = []
        pieces = await self._pieces(sandbox, hunks, suite)
        ends = time.monotonic() + self.limits.pieces_s
        for ways in pieces:
            for piece in ways:
                if time.monotonic() > ends:
                    self.record.pieces["out of time"] = 1
                    return rows
                row = await self._task(sandbox, piece, hunks, suite)
                if row is not None:
                    rows.append(row)
                    break
            else:
                coupled += [ways[0]] if ways[0] in suite.more else []
        for piece in coupled:
            if time.monotonic() > ends:
                self.record.pieces["out of time"] = 1
                break
            grown = await self._grown(sandbox, piece, hunks, suite)
            row = (
                await self._task(sandbox, grown, hunks, suite) if len(grown) < len(hunks) else None
            )
            rows += [row] if row is not None else []
        return rows

    async def _pieces(
        self, sandbox: Sandbox, hunks: list[Hunk], suite: _Suite
    ) -> list[tuple[tuple[Hunk, ...], ...]]:
        """The independent fixes, smallest first; each as what may be taken back for it, the most
        likely first."""
        if len(hunks) == 1:
            return []
        ends = time.monotonic() + self.limits.split_s

        async def failing(some: Sequence[Hunk], tests: Sequence[str]) -> set[str]:
            if time.monotonic() > ends:
                return set()
            if len(some) == 1:
                tests = self._feeling(some[0], tests, suite.measured)
            if not tests:
                return set()
            found = await self._cases(sandbox, some, tests)
            return {id for id, case in found.items() if case.outcome in ("failed", "error")}

        # one of each parametrised test is enough to tell the hunks apart
        chosen = _one_of_each(suite.bugs)[:60]
        alone = [hunk for hunk in hunks if self._feeling(hunk, chosen, suite.measured)]
        found = await split(hunks, alone, chosen, failing, self.limits.split_runs)
        pieces = same_tests(found)
        pieces.sort(key=lambda ways: (len(ways[0]), sum(hunk.lines for hunk in ways[0]), ways))
        self.record.pieces["found"] = len(pieces)
        return pieces[: self.limits.pieces]

    async def _task(
        self, sandbox: Sandbox, piece: tuple[Hunk, ...], hunks: list[Hunk], suite: _Suite
    ) -> Mined | None:
        """The task of one piece, if it breaks nothing that the older release did not, and if other
        tests tell it than those before it."""
        counts = self.record.pieces
        if len(piece) < len(hunks):
            try:
                failing, more = await self._failing(sandbox, piece, suite.passing, suite)
            except _CutShort:
                counts["cut short"] = counts.get("cut short", 0) + 1
                return None
            if more:
                suite.more[piece] = more
                counts["breaks more"] = counts.get("breaks more", 0) + 1
                return None
        else:
            failing = suite.broken
        wanted = [id for id in suite.bugs if id in failing]
        if not wanted or frozenset(wanted) in suite.told:
            counts["told already"] = counts.get("told already", 0) + 1
            return None
        f2p = _spread_out(wanted, suite.measured, self.limits.fail_to_pass)
        rest = [id for id in suite.passing if id not in failing]
        p2p = self._near(piece, rest, suite.measured)
        buggy = Tree(self.new.tree, self._buggy(piece), self.new.python_path)
        proof = await prove(sandbox, buggy, self.fixed, f2p, p2p, self.limits.repeat)
        self.record.dropped |= proof.dropped
        if not proof.fail_to_pass or proof.seconds > self.limits.run_s:
            counts["not proven"] = counts.get("not proven", 0) + 1
            return None
        counts["kept"] = counts.get("kept", 0) + 1
        suite.told.add(frozenset(wanted))
        operator = "release" if 1 < len(hunks) == len(piece) else "fix"
        return self._row(piece, operator, proof.fail_to_pass, proof.pass_to_pass, proof.seconds)

    async def _failing(
        self, sandbox: Sandbox, piece: Sequence[Hunk], tests: Sequence[str], suite: _Suite
    ) -> tuple[set[str], set[str]]:
        """The tests that fail with a piece taken back, and those of them that fail otherwise than
        on the older release: they pass there, or show a bug there and here only a missing name."""
        feeling = {id for hunk in piece for id in self._feeling(hunk, tests, suite.measured)}
        tests = [id for id in tests if id in feeling]
        cases = await self._cases(sandbox, piece, tests) if tests else {}
        failing = {id: case for id, case in cases.items() if case.outcome != "passed"}
        bugs = set(suite.bugs)
        more = {
            id
            for id, case in failing.items()
            if id not in suite.broken or (id in bugs and kind(case, self.versions) != "bug")
        }
        return set(failing), more

    async def _grown(
        self, sandbox: Sandbox, piece: tuple[Hunk, ...], hunks: list[Hunk], suite: _Suite
    ) -> tuple[Hunk, ...]:
        """The piece with the fewest other hunks that have to go with it, so that the tests that it
        breaks end as they do on the older release.

        Where a fix adds a function in one place and calls it in another, the one cannot be taken
        back without the other.
        """
        others = [hunk for hunk in hunks if hunk not in piece]
        tests = _one_of_each(sorted(suite.more[piece]))[:6]

        async def mended(some: Sequence[Hunk], same: Sequence[str]) -> set[str]:
            _, still = await self._failing(sandbox, [*piece, *some], tests, suite)
            return set() if still else {""}

        added, _ = await ddmin(others, "", mended, self.limits.grow_runs)
        return tuple(sorted([*piece, *added]))

    def _row(
        self,
        piece: tuple[Hunk, ...],
        operator: str,
        f2p: list[str],
        p2p: list[str],
        seconds: float,
    ) -> Mined:
        files = self._buggy(piece)
        changed = {path: self.new_files[path] for path in files}
        make_patch(changed, files)  # raises for what a patch cannot carry
        largest = max(piece, key=lambda hunk: hunk.lines)
        sha256 = digest(files)
        return Mined(
            source="release",
            name=f"{self.new.name}-{self.new.version}-{operator}-{sha256[:6]}",
            package=self.new.name,
            old=self.old.version,
            version=self.new.version,
            old_sha256=self.old.sha256,
            sdist_sha256=self.new.sha256,
            uploaded=self.uploaded,
            split=self.new.split,
            licence=self.new.licence,
            operator=operator,
            module=largest.path,
            function=function_at(self.new_files[largest.path], largest.new[0] + 1),
            hunks=ranges(piece),
            lines=sum(hunk.lines for hunk in piece),
            sha256=sha256,
            package_source=list(self.new.source),
            tests=list(self.new.tests),
            python_path=list(self.new.python_path),
            requirements=list(self.new.requirements),
            f2p=group(f2p),
            p2p=group(p2p),
            repeat=self.limits.repeat,
            seconds=round(seconds, 3),
        )

    # -- running

    def _buggy(self, hunks: Collection[Hunk]) -> dict[str, bytes]:
        return take_back(hunks, self.new_files, self.old_files)

    async def _cases(
        self, sandbox: Sandbox, hunks: Collection[Hunk], tests: Sequence[str]
    ) -> dict[str, TestCase]:
        """Run tests with some hunks taken back.

        Raises _CutShort if the run was cut short: all of the rest would look as if it failed. Of
        a few tests, those not reached are left out.
        """
        await sandbox.reset(Tree(self.new.tree, self._buggy(hunks), self.new.python_path))
        report = await sandbox.run_tests(tests, timeout_s=self._patience_s)
        missing = any(case.outcome == "missing" for case in report.cases)
        cut_short = report.killed_by or report.exit_code not in (0, 1)
        if missing and cut_short and (not hunks or len(tests) > 60):
            raise _CutShort(f"the test run was cut short: {report.killed_by or report.exit_code}")
        return {case.id: case for case in report.cases}

    def _kind(self, case: TestCase) -> str:
        found = kind(case, self.versions)
        self.record.kinds[found] = self.record.kinds.get(found, 0) + 1
        return found

    def _usable(self, id: str) -> bool:
        plain = id.isascii() and id.isprintable() and " at 0x" not in id and "0x7" not in id
        return plain and len(id) <= self.limits.id_chars and not looks_at_clock(id)

    def _feeling(self, hunk: Hunk, tests: Sequence[str], measured: Coverage) -> list[str]:
        """Those of the tests that execute the function whose body a hunk lies in; all, if it lies
        in none, or in one that is executed when modules are imported."""
        data = self.new_files[hunk.path]
        around = [
            (span, body)
            for span, body in _bodies(data)
            if body <= hunk.new[0] + 1 and max(hunk.new[1], hunk.new[0] + 1) <= span.end_line
        ]
        if not around:
            return list(tests)
        # the outermost: nested functions are made, and decorated, when it runs
        line = min(span.line for span, _ in around)
        if (hunk.path, line) in measured.imported:
            return list(tests)
        executing = set(measured.tests.get((hunk.path, line), ()))
        return [id for id in tests if id in executing]

    def _near(self, piece: Collection[Hunk], tests: list[str], measured: Coverage) -> list[str]:
        """Tests to keep passing: half that execute the functions changed, half others, quick."""
        paths = {hunk.path for hunk in piece}
        inside = {
            id
            for (path, line), ids in measured.tests.items()
            if path in paths and _touches(piece, path, line, self.new_files[path])
            for id in ids
        }
        half = self.limits.pass_to_pass // 2
        near = _spread_out([id for id in tests if id in inside], measured, half)
        others = [id for id in tests if id not in inside]
        return near + _spread_out(others, measured, self.limits.pass_to_pass - len(near))


def _touches(piece: Collection[Hunk], path: str, line: int, data: bytes) -> bool:
    """Whether a hunk lies in the function that begins at this line."""
    end = next((s.end_line for s, _ in _bodies(data) if s.line == line), line)
    return any(h.path == path and h.new[0] < end and h.new[1] >= line - 1 for h in piece)


@lru_cache(maxsize=64)
def _bodies(data: bytes) -> list[tuple[FunctionSpan, int]]:
    """Functions of a module, each with the first line of its body; none if it does not parse."""
    try:
        found = Code(data.decode("utf-8")).functions
    except (InputError, UnicodeDecodeError):
        return []
    return [(span, node.body[0].lineno) for span, node in found]


def function_at(data: bytes, line: int) -> str:
    """Qualified name of the innermost function around a line; `OUTSIDE` any of them."""
    around = [span for span, _ in _bodies(data) if span.line <= line <= span.end_line]
    return min(around, key=lambda s: s.end_line - s.line).name if around else OUTSIDE


def _one_of_each(tests: Sequence[str]) -> list[str]:
    """The first of each parametrised test, then the others."""
    seen: set[str] = set()
    first: list[str] = []
    others: list[str] = []
    for id in tests:
        base = id.partition("[")[0]
        (others if base in seen else first).append(id)
        seen.add(base)
    return first + others


def _spread_out(tests: Sequence[str], measured: Coverage, count: int) -> list[str]:
    """The quickest `count` tests, one of each parametrised test before a second one."""
    quick = sorted(tests, key=lambda id: (measured.seconds.get(id, 0.0) > 0.1, len(id), id))
    return _one_of_each(quick)[:count]


def tasks_of(record: Mapping[str, Any]) -> list[Mined]:
    """The tasks of a pair's record."""
    return [Mined(**task) for task in record["tasks"]]
