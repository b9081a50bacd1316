"""Real bugs: what the tests of a release find in the release before it.

For two adjacent releases: run the newer one's tests on it, run those that pass on the newer tree
with the older source, see which failures are bugs, take the source diff apart into independent
fixes, and prove each. What a pair gave, or why it gave nothing, is one record.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.errors import InputError
from sandbox.base import SandboxBroken, TestCase, Tree
from sandbox.coverage import coverage
from sandbox.failures import kind, looks_at_clock
from sandbox.hunks import digest, hunks_between, source_files
from sandbox.local import LocalPool
from sandbox.mined import Mined, ranges
from sandbox.packages import Package
from sandbox.patch import make_patch
from sandbox.pieces import Difference, Piece, failing_with, find_pieces, grow
from sandbox.prove import Proof, prove
from sandbox.shipped import group
from sandbox.taken_back import CutShort, TakenBack, function_at


@dataclass(frozen=True)
class MineLimits:
    """How much of a pair is looked at, and what a task may be."""

    suite_s: float = 90.0
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


class _Pair:
    def __init__(
        self, new: Package, old: Package, uploaded: str, limits: MineLimits, record: PairRecord
    ) -> None:
        self.new, self.old, self.uploaded = new, old, uploaded
        self.limits, self.record = limits, record
        self.fixed = Tree(new.tree, {}, new.python_path)
        self.versions = (new.version, old.version)
        self.told: set[frozenset[str]] = (
            set()
        )  # the bugs that are tasks, by the tests that show them
        self.more: dict[Piece, set[str]] = {}  # what pieces break that the older release does not

    async def mine(self, pool: LocalPool) -> None:
        new_files, old_files = source_files(self.new), source_files(self.old)
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
            self.taken_back = TakenBack(
                self.new, new_files, old_files, measured, sandbox, self.limits.suite_s
            )
            await self._mine(tuple(hunks), passing)

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

    async def _mine(self, hunks: Piece, passing: list[str]) -> None:
        # the suite again, with the runner that tasks are judged by; a test must pass here, too
        began = time.monotonic()
        again = await self.taken_back.cases([], passing)
        patience_s = 10 + 5 * (time.monotonic() - began)
        self.taken_back.patience_s = min(self.limits.suite_s, patience_s)
        passing = [id for id in passing if again[id].outcome == "passed"]
        cases = await self.taken_back.cases(hunks, passing)
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
        self.change = Difference(self.versions, hunks, passing, frozenset(broken), bugs)
        rows = [*await self._fixes(), *await self._task(hunks)]
        self.record.tasks = [row.record() for row in rows]
        self.record.status = "tasks" if rows else "none"
        self.record.reason = "" if rows else "no piece of the diff held in the proof"

    async def _fixes(self) -> list[Mined]:
        """The tasks of the independent fixes: first of those that hold as they are, then of those
        that take others along, which is dear, until the time for a pair is up."""
        limits = self.limits
        pieces = await find_pieces(self.change, self.taken_back, limits.split_runs, limits.split_s)
        self.record.pieces["found"] = len(pieces)
        rows: list[Mined] = []
        coupled: list[Piece] = []
        ends = time.monotonic() + limits.pieces_s
        for ways in pieces[: limits.pieces]:
            for piece in ways:
                if time.monotonic() > ends:
                    self._count("out of time")
                    return rows
                if found := await self._task(piece):
                    rows += found
                    break
            else:
                coupled += [ways[0]] if ways[0] in self.more else []
        for piece in coupled:
            if time.monotonic() > ends:
                self._count("out of time")
                return rows
            more = self.more[piece]
            grown = await grow(self.change, self.taken_back, piece, more, limits.grow_runs)
            rows += await self._task(grown) if len(grown) < len(self.change.hunks) else []
        return rows

    async def _task(self, piece: Piece) -> list[Mined]:
        """The task of one piece: if it breaks nothing that the older release did not, if other
        tests tell it than those before it, and if it holds in the proof."""
        change, whole = self.change, len(piece) == len(self.change.hunks)
        failing, more = set(change.broken), set[str]()
        if not whole:
            try:
                failing, more = await failing_with(change, self.taken_back, piece, change.passing)
            except CutShort:
                return self._count("cut short")
        if more:
            self.more[piece] = more
            return self._count("breaks more")
        wanted = [id for id in change.bugs if id in failing]
        if not wanted or frozenset(wanted) in self.told:
            return self._count("told already")
        f2p = self.taken_back.measured.quickest(wanted, self.limits.fail_to_pass)
        rest = [id for id in change.passing if id not in failing]
        p2p = self.taken_back.beside(piece, rest, self.limits.pass_to_pass)
        buggy, sandbox = self.taken_back.tree(piece), self.taken_back.sandbox
        proof = await prove(sandbox, buggy, self.fixed, f2p, p2p, self.limits.repeat)
        self.record.dropped |= proof.dropped
        if not proof.fail_to_pass or proof.seconds > self.limits.run_s:
            return self._count("not proven")
        self._count("kept")
        self.told.add(frozenset(wanted))
        operator = "release" if whole and len(piece) > 1 else "fix"
        return [self._row(piece, operator, proof)]

    def _count(self, what: str) -> list[Mined]:
        self.record.pieces[what] = self.record.pieces.get(what, 0) + 1
        return []

    def _row(self, piece: Piece, operator: str, proof: Proof) -> Mined:
        files, new_files = self.taken_back.files(piece), self.taken_back.new_files
        # raises for what a patch cannot carry
        make_patch({path: new_files[path] for path in files}, files)
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
            function=function_at(new_files[largest.path], largest.new[0] + 1),
            hunks=ranges(piece),
            lines=sum(hunk.lines for hunk in piece),
            sha256=sha256,
            package_source=list(self.new.source),
            tests=list(self.new.tests),
            python_path=list(self.new.python_path),
            requirements=list(self.new.requirements),
            f2p=group(proof.fail_to_pass),
            p2p=group(proof.pass_to_pass),
            repeat=self.limits.repeat,
            seconds=round(proof.seconds, 3),
        )

    def _kind(self, case: TestCase) -> str:
        found = kind(case, self.versions)
        self.record.kinds[found] = self.record.kinds.get(found, 0) + 1
        return found

    def _usable(self, id: str) -> bool:
        plain = id.isascii() and id.isprintable() and " at 0x" not in id and "0x7" not in id
        return plain and len(id) <= self.limits.id_chars and not looks_at_clock(id)


def tasks_of(record: Mapping[str, Any]) -> list[Mined]:
    """The tasks of a pair's record."""
    return [Mined(**task) for task in record["tasks"]]
