"""Which tests execute which functions: measured once for each package, in a sandbox, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import InputError
from configs.files import write_atomic
from configs.paths import cache_dir
from sandbox.base import Limits, Tree
from sandbox.isolation import interpreter
from sandbox.local import LocalPool
from sandbox.packages import Package

SLOW_S = 0.1  # a test that there are quicker ones than
_PROBE = Path(__file__).with_name("coverage_probe.py")
_ARGUMENTS = ("-q", "-c", "/dev/null", "--rootdir", ".", "--confcutdir", ".", "-pno:cacheprovider")
# pytest's own names, and those of a folder's only file
_FILES = "-opython_files=test_*.py *_test.py test.py tests.py"
_GO_ON = "--continue-on-collection-errors"
# whole test suites: minutes, and a report of megabytes
_LIMITS = Limits(memory_mib=4096, processes=256, wall_s=600.0, output_bytes=128 << 20)


@dataclass(frozen=True)
class Coverage:
    """What a package's own tests do.

    Attributes:
      seconds: time of each passing test, by pytest id.
      tests: ids of the passing tests that execute the function whose first line (from 1,
        decorators counted in) is that line of that file; by (path, line).
      imported: functions, likewise, that are executed before any test, by imports and collection.
    """

    seconds: dict[str, float]
    tests: dict[tuple[str, int], list[str]]
    not_passed: int
    imported: frozenset[tuple[str, int]] = frozenset()

    def quickest(self, tests: Iterable[str], count: int) -> list[str]:
        """The quickest `count` tests, one of each parametrised test before a second one."""
        slow = {id for id, seconds in self.seconds.items() if seconds > SLOW_S}
        return one_of_each(sorted(tests, key=lambda id: (id in slow, len(id), id)))[:count]


def one_of_each(tests: Iterable[str]) -> list[str]:
    """The first of each parametrised test, then the others."""
    seen: set[str] = set()
    first: list[str] = []
    others: list[str] = []
    for id in tests:
        base = id.partition("[")[0]
        (others if base in seen else first).append(id)
        seen.add(base)
    return first + others


async def coverage(
    package: Package,
    backend: str = "auto",
    wall_s: float = _LIMITS.wall_s,
) -> Coverage:
    """Run the package's whole tests once; a later call reads the cached measurement.

    Raises InputError when the tests cannot be run.
    """
    probe = _PROBE.read_bytes()
    stamp = hashlib.sha256(probe + repr((_FILES, package)).encode()).hexdigest()[:12]
    cached = cache_dir() / "coverage" / f"{package.name}-{package.version}-{stamp}.json"
    if not cached.is_file():
        ignored = [f"--ignore={path}" for path in package.skip]
        argv = [interpreter(), "-S", "-", *_ARGUMENTS, _FILES, _GO_ON, *ignored, *package.tests]
        tree = Tree(package.tree, {}, package.python_path)
        limits = replace(_LIMITS, wall_s=wall_s)
        async with LocalPool(1, limits, backend) as pool, pool.lease(tree) as sandbox:
            result = await sandbox.exec(argv, stdin=probe)
        if result.exit_code != 0 or result.killed_by:
            last = result.stderr.strip()[-300:]
            raise InputError(f"{package.name}: its tests could not be run: {last}")
        write_atomic(cached, result.stdout)
    measured = json.loads(cached.read_text())
    good = {id: test for id, test in measured["tests"].items() if test["outcome"] == "passed"}
    tests: dict[tuple[str, int], list[str]] = {}
    for id, test in good.items():
        for index in test["functions"]:
            path, line = measured["functions"][index]
            tests.setdefault((path, line), []).append(id)
    seconds = {id: test["seconds"] for id, test in good.items()}
    places = (measured["functions"][index] for index in measured["imported"])
    imported = frozenset((path, line) for path, line in places)
    return Coverage(seconds, tests, len(measured["tests"]) - len(good), imported)
