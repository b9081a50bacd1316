"""Making tasks from a package: every one is a real bug that tests notice."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.coverage import coverage
from sandbox.generate import Plan, TooSlow, fingerprints, generate
from sandbox.local import LocalPool
from sandbox.mutate import apply, mutations
from sandbox.packages import Package, adopt
from sandbox.patch import make_patch
from sandbox.shipped import Row, make_task, ungroup
from sandbox.verify import Check, verify
from tests.sandbox.releases import sdist

SOURCE = '''\
def clamp(value, low, high):
    """Limit."""
    if value < low:
        return low
    if value > high:
        return high
    return value


def spin(count):
    for left in range(count, 0, -1):
        count -= 1
        if count == 3:
            break
    return count


def untested(value):
    if value:
        return 1
    return 2
'''
TESTS = """\
import random
import unittest

import pytest

from mini import clamp, spin


@pytest.mark.parametrize("value", [-1, 0, 5, 9, 12])
def test_clamp(value):
    assert clamp(value, 0, 9) == sorted([0, value, 9])[1]


class TestSpin(unittest.TestCase):
    def test_spin(self):
        self.assertEqual(spin(5), 3)


def test_fails_anyway():
    assert clamp(1, 2, 3) == 1


def test_skipped():
    pytest.skip("no")


def test_flaky():
    assert spin(random.randrange(4)) == 0
"""
FILES = {"mini/__init__.py": SOURCE, "mini/tests/test_mini.py": TESTS}


def packed(files: dict[str, str], tmp_path: Path) -> Package:
    archive = tmp_path / "mini.tar.gz"
    archive.write_bytes(sdist(files))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = Package("mini", "1.0", digest, "MIT", "train", ("mini",), ("mini/tests",), (".",))
    adopt(package, archive)
    return package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    return packed(FILES, tmp_path)


async def make(package: Package, plan: Plan, foreign: frozenset[str] = frozenset()) -> list[Row]:
    async with LocalPool(1) as pool:
        return [row async for row in generate(package, plan, pool, foreign)]


def test_coverage_tells_which_tests_run_which_function(package: Package) -> None:
    measured = asyncio.run(coverage(package))
    path = "mini/tests/test_mini.py"
    cases = {f"{path}::test_clamp[{value}]" for value in (-1, 0, 5, 9, 12)}
    spins = {f"{path}::TestSpin::test_spin", f"{path}::test_flaky"}
    assert set(measured.tests["mini/__init__.py", 1]) == cases
    assert set(measured.tests["mini/__init__.py", 10]) == spins
    assert ("mini/__init__.py", 18) not in measured.tests
    assert set(measured.seconds) == cases | spins and measured.not_passed == 2


def test_coverage_tells_what_imports_execute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    source = "def limit():\n    return 3\n\n\ndef most(x):\n    return min(x, LIMIT)\n\n\n"
    source += "LIMIT = limit()\n"
    tests = "from mini import most\n\n\ndef test_most():\n    assert most(5) == 3\n"
    files = {"mini/__init__.py": source, "mini/tests/test_mini.py": tests}
    measured = asyncio.run(coverage(packed(files, tmp_path)))
    assert ("mini/__init__.py", 1) in measured.imported
    assert ("mini/__init__.py", 5) not in measured.imported
    assert set(measured.tests) == {("mini/tests/test_mini.py", 4), ("mini/__init__.py", 5)}

    # no test can be collected: nothing ends the watching but the run itself
    files["mini/tests/test_mini.py"] = "import no_such_module\n"
    measured = asyncio.run(coverage(packed(files, tmp_path)))
    assert not measured.seconds and ("mini/__init__.py", 1) not in measured.tests


def test_every_task_is_proven(package: Package) -> None:
    # test_flaky passes three times in four on some bugs: 3 runs would let it slip through
    rows = asyncio.run(make(package, Plan(per_function=3, max_covering=5, repeat=25)))
    assert {row.function for row in rows} == {"clamp", "spin"}
    assert len(rows) == len({row.sha256 for row in rows}) == len({row.name for row in rows}) >= 4
    for row in rows:
        edit = mutations(SOURCE, row.function)[row.ordinal]
        buggy = apply(SOURCE, edit).encode()
        assert hashlib.sha256(buggy).hexdigest() == row.sha256
        assert edit.operator == row.operator and ungroup(row.f2p)

    async def check() -> list[Check]:
        checks = []
        async with LocalPool(1) as pool:
            for row in rows:
                edit = mutations(SOURCE, row.function)[row.ordinal]
                patch = make_patch(
                    {row.module: SOURCE.encode()}, {row.module: apply(SOURCE, edit).encode()}
                )
                task = make_task(package, row, patch)
                checks.append(await verify(task, pool))
        return checks

    assert all(check.flips for check in asyncio.run(check()))


def test_code_of_the_other_split_is_left_alone(package: Package, tmp_path: Path) -> None:
    renamed = SOURCE.replace("clamp", "limit").replace('"""Limit."""', "# the same code")
    archive = tmp_path / "other.tar.gz"
    archive.write_bytes(sdist({"mini/__init__.py": renamed}))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    other = Package("other", "1.0", digest, "MIT", "heldout", ("mini",), ("t",), (".",))
    adopt(other, archive)
    assert asyncio.run(make(package, Plan(), frozenset(fingerprints([other])))) == []


def test_a_limit_is_kept(package: Package) -> None:
    rows = asyncio.run(make(package, Plan(per_package={"train": 2}, repeat=1)))
    assert len(rows) == 2 and all(row.repeat == 1 for row in rows)


def test_the_same_plan_gives_the_same_tasks(package: Package, tmp_path: Path) -> None:
    archive = tmp_path / "certain.tar.gz"
    certain = TESTS.partition("def test_flaky")[0]
    archive.write_bytes(sdist({**FILES, "mini/tests/test_mini.py": certain}))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    other = replace(package, name="certain", sha256=digest)
    adopt(other, archive)

    def made() -> list[Row]:
        rows = asyncio.run(make(other, Plan(per_function=3, repeat=2)))
        return [replace(row, seconds=0.0) for row in rows]

    assert made() == made() != []


def test_a_package_with_slow_tests_is_given_up(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.generate.MAX_SLOW", 1)
    monkeypatch.setattr("sandbox.trial.MAX_RUN_S", 0.001)
    with pytest.raises(TooSlow, match="mini"):
        asyncio.run(make(package, Plan()))
