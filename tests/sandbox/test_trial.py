"""Runs that decide whether a mutation makes a task."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.base import Tree
from sandbox.leased import LeasedSandbox
from sandbox.local import LocalPool
from sandbox.packages import Package
from sandbox.trial import Trials

T = TypeVar("T")

SOURCE = """\
def countdown(count):
    while count > 0:
        count -= 1
    return count
"""
TESTS = """\
import random

from mini import countdown


def test_zero():
    assert countdown(3) == 0


def test_type():
    assert isinstance(countdown(2), int)


def test_flaky():
    assert countdown(1) == 0 and random.random() < 0.5
"""
ZERO, TYPE, FLAKY = (f"test_mini.py::{name}" for name in ("test_zero", "test_type", "test_flaky"))


class OneTree(Package):
    """A package whose tree lies where the test has put it."""

    root: Path

    @property
    def tree(self) -> Path:
        return self.root


@pytest.fixture
def package(tmp_path: Path) -> Package:
    (tmp_path / "mini.py").write_text(SOURCE)
    (tmp_path / "test_mini.py").write_text(TESTS)
    package = OneTree(
        "mini", "1", "0" * 64, "MIT", "train", ("mini.py",), ("test_mini.py",), (".",)
    )
    object.__setattr__(package, "root", tmp_path)
    return package


def sandboxed(package: Package, use: Callable[[LeasedSandbox], Awaitable[T]]) -> T:
    async def go() -> T:
        async with LocalPool(1) as pool, pool.lease(Tree(package.tree, {})) as sandbox:
            return await use(sandbox)

    return asyncio.run(go())


def test_a_loop_without_end_stops_at_its_cpu_time(package: Package) -> None:
    endless = SOURCE.replace("count -= 1", "pass").encode()

    async def use(sandbox: LeasedSandbox) -> None:
        await sandbox.reset(Tree(package.tree, {"mini.py": endless}))
        report = await sandbox.run_tests([ZERO], timeout_s=60.0, cpu_s=0.5)
        assert report.cases[0].outcome == "missing" and not report.passed([ZERO])
        assert 0.3 < report.cpu_s < 2.0 and not report.timed_out
        trials = Trials(package, sandbox, repeat=2)
        assert await trials.prove("mini.py", endless, [ZERO], []) is None

    sandboxed(package, use)


def test_tests_that_waver_on_the_release_are_left_out(package: Package) -> None:
    async def use(sandbox: LeasedSandbox) -> None:
        trials = Trials(package, sandbox, repeat=25)
        await trials.rehearse([ZERO, FLAKY])
        assert await trials.steady([ZERO, TYPE, FLAKY], 25) == [ZERO, TYPE]

    sandboxed(package, use)


def test_a_task_is_seen_as_often_as_asked(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[bool, frozenset[str]]] = []
    run_tests = LeasedSandbox.run_tests

    async def count(self: LeasedSandbox, ids: list[str], **options: object) -> object:
        broken = bool(self._leased().overlay)
        runs.append((broken, frozenset(ids)))
        return await run_tests(self, ids, **options)  # type: ignore[arg-type]

    async def use(sandbox: LeasedSandbox) -> None:
        trials = Trials(package, sandbox, repeat=3)
        assert await trials.steady([ZERO, TYPE], 3) == [ZERO, TYPE]
        for bug in ("return count + 1", "return count + 2"):
            buggy = SOURCE.replace("return count", bug).encode()
            proven = await trials.prove("mini.py", buggy, [ZERO], [TYPE])
            assert proven and proven.fail_to_pass == [ZERO] and proven.pass_to_pass == [TYPE]

    monkeypatch.setattr(LeasedSandbox, "run_tests", count)
    sandboxed(package, use)
    # three times on the release for both, three times with each bug
    assert runs == [(False, frozenset({ZERO, TYPE}))] * 3 + [(True, frozenset({ZERO, TYPE}))] * 6


def test_a_bug_that_other_orders_show_otherwise_makes_no_task(package: Package) -> None:
    # right for whoever comes first: in file order that is test_zero, every time
    buggy = SOURCE.replace("return count", "seen.append(1)\n    return len(seen) - 1")
    buggy = "seen = []\n" + buggy.replace("(count):", "(count, seen=seen):")
    tests = TESTS.replace("isinstance(countdown(2), int)", "countdown(2) == 0")
    tests = tests.replace(" and random.random() < 0.5", "")
    (package.tree / "test_mini.py").write_text(tests)

    async def use(sandbox: LeasedSandbox) -> None:
        trials = Trials(package, sandbox, repeat=2)
        assert await trials.steady([ZERO, TYPE, FLAKY], 2) == [ZERO, TYPE, FLAKY]
        assert await trials.prove("mini.py", buggy.encode(), [ZERO, TYPE, FLAKY], []) is None

    assert random.Random(1).sample([TYPE, FLAKY, ZERO], 3)[0] != ZERO
    sandboxed(package, use)
