"""What decides a repair: in `simplified` the task's own tests, in `full` a build and all tests.

The suite is every test that the repository's tests hold and that passes on the gold tree (the
release itself), twice, in the sandbox that judges. It is measured once for each release and kept in
the cache. The build of a pure-Python package is that its modules compile, and that the package and
the module under repair can be imported: as far as that works on the gold tree.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

from configs.errors import InputError
from configs.files import write_atomic
from configs.paths import cache_dir
from sandbox.base import Sandbox, SandboxPool, TestReport, Tree
from sandbox.environments import Environment
from sandbox.failures import looks_at_clock
from sandbox.task import ALWAYS_PROTECTED

SUITE_S = 300.0  # for one run of a whole suite on the gold tree
SLACK = 5.0  # how much longer a run with a patch may take
_LISTED = ".remend-suite.json"
_TEST_FILES = ("test_*.py", "*_test.py")  # what pytest collects by itself
_VERSION = 2  # of what a kept measurement holds

# writes the ids of all tests below the arguments
_LIST = f"""
import json, os, sys
import pytest

class Lister:
    def pytest_collection_finish(self, session):
        with open({_LISTED!r}, "w") as file:
            json.dump([item.nodeid for item in session.items], file)

options = ["-q", "-c", os.devnull, "--rootdir", ".", "--confcutdir", ".", "-pno:cacheprovider"]
options += ["--collect-only", "--continue-on-collection-errors"]
sys.stdout = sys.stderr = open(os.devnull, "w")
pytest.main([*options, *sys.argv[1:]], plugins=[Lister()])
"""
# compiles what the first argument names, then imports the others; the last line says what is wrong
_BUILD = """
import importlib, pathlib, sys
place, *modules = sys.argv[1:]
path = pathlib.Path(place)
for file in (sorted(path.rglob("*.py")) or [path]) if place else []:
    compile(file.read_bytes(), str(file), "exec")
for module in modules:
    importlib.import_module(module)
"""


class Judged(Protocol):
    """What of a task decides; see `sandbox.task.Task`."""

    @property
    def module(self) -> str: ...
    @property
    def fail_to_pass(self) -> tuple[str, ...]: ...
    @property
    def pass_to_pass(self) -> tuple[str, ...]: ...
    @property
    def protected(self) -> tuple[str, ...]: ...
    def tree(self) -> Tree: ...


@dataclass(frozen=True)
class Checks:
    """What decides a repair in one environment.

    Attributes:
      fail_to_pass, pass_to_pass: pytest ids that must all pass.
      build: command that must end with exit code 0 before tests are run; empty: there is none.
      timeout_s: of one run of the tests; None: the sandbox's own limit.
    """

    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    build: tuple[str, ...] = ()
    timeout_s: float | None = None

    @property
    def tests(self) -> tuple[str, ...]:
        return (*self.fail_to_pass, *self.pass_to_pass)

    async def run(
        self, sandbox: Sandbox, clean: Tree | None = None, shuffle: int | None = None
    ) -> tuple[str, TestReport | None]:
        """Build, then test: why the build failed ("" if it did not), and the tests' report.

        With `clean`, the tests find that tree, whatever code ran at the build.
        """
        if self.build:
            done = await sandbox.exec(self.build)
            if done.exit_code or done.killed_by:
                last = done.stderr.strip().rpartition("\n")[2]
                return done.killed_by or last or f"exit code {done.exit_code}", None
            if clean is not None:
                await sandbox.reset(clean)
        return "", await sandbox.run_tests(self.tests, timeout_s=self.timeout_s, shuffle=shuffle)


@dataclass(frozen=True)
class Suite:
    """The whole tests of a release, as measured on the gold tree.

    Attributes:
      release: name of its tree.
      tests: ids of those that pass, in the order of files.
      left_out: outcome, or reason, by id, of the others that were collected.
      build: the build command that works on the gold tree.
      seconds: the longest run.
    """

    release: str
    tests: tuple[str, ...]
    left_out: dict[str, str]
    build: tuple[str, ...]
    seconds: float


async def checks_of(task: Judged, pool: SandboxPool, environment: Environment) -> Checks:
    """What decides a repair of `task` there; for `full` the suite is measured if it is not known.

    Raises InputError when the task cannot be judged in `full`: its suite cannot be run, or none of
    its failing tests passes in it.
    """
    if environment == "simplified":
        return Checks(task.fail_to_pass, task.pass_to_pass)
    suite = await suite_of(task, pool)
    inside = set(suite.tests)
    to_fix = tuple(id for id in task.fail_to_pass if id in inside)
    if not to_fix:
        why = suite.left_out.get(task.fail_to_pass[0], "not collected")
        raise InputError(
            f"a task of {suite.release} cannot be judged in the full environment: "
            f"{task.fail_to_pass[0]} does not pass among all tests of the release: {why}"
        )
    rest = tuple(id for id in suite.tests if id not in set(to_fix))
    timeout_s = pool.limits.wall_s + SLACK * suite.seconds
    return Checks(to_fix, rest, suite.build, timeout_s)


# by pool, then by what was measured; a suite that could not be run is not tried again either
_Known = dict[str, Suite | InputError]
_known: weakref.WeakKeyDictionary[SandboxPool, _Known] = weakref.WeakKeyDictionary()
_locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Lock]] = (
    weakref.WeakKeyDictionary()
)


async def suite_of(task: Judged, pool: SandboxPool) -> Suite:
    """The whole suite of the task's release, measured in a sandbox of `pool`, once.

    Raises InputError when it cannot be run.
    """
    buggy = await asyncio.to_thread(task.tree)
    gold = Tree(buggy.root, {}, buggy.python_path)
    places = test_places(task, gold.root)
    build = build_of(task.module, gold)
    what = json.dumps([_VERSION, str(gold.root), places, build, gold.python_path])
    locks = _locks.setdefault(asyncio.get_running_loop(), {})
    async with locks.setdefault(what, asyncio.Lock()):
        known = _known.setdefault(pool, {})
        if what not in known:
            try:
                known[what] = await _kept(pool, gold, places, build, what)
            except InputError as error:
                known[what] = error
        found = known[what]
        if isinstance(found, InputError):
            raise InputError(str(found))
        return found


async def _kept(
    pool: SandboxPool,
    gold: Tree,
    places: Sequence[str],
    build: Sequence[Sequence[str]],
    what: str,
) -> Suite:
    """The measurement in the cache, made if it is not there."""
    async with pool.lease(gold) as sandbox:  # the pool knows its environment from now on
        key = f"{what}{pool.backend}{pool.environment}{pool.limits}"
        stamp = hashlib.sha256(key.encode()).hexdigest()[:16]
        path = cache_dir() / "suites" / f"{gold.root.name}-{stamp}.json"
        if not path.is_file():
            suite = await _measure(sandbox, gold, places, build)
            write_atomic(path, json.dumps(asdict(suite)))
        return _read(path)


def _read(path: Path) -> Suite:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data |= {key: tuple(data[key]) for key in ("tests", "build")}
        return Suite(**data)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}): delete it, to measure anew") from None


async def _measure(
    sandbox: Sandbox, gold: Tree, places: Sequence[str], build: Sequence[Sequence[str]]
) -> Suite:
    """Collect, run twice, keep what passed both times."""
    working: tuple[str, ...] = ()
    for command in build:
        if (await sandbox.exec(command)).exit_code == 0:
            working = tuple(command)
            break
    await sandbox.exec(["python3", "-S", "-c", _LIST, *places], timeout_s=SUITE_S)
    try:
        listed = json.loads(await sandbox.read(_LISTED))
    except (OSError, ValueError, RuntimeError):
        raise InputError(f"{gold.root.name}: its tests cannot be collected") from None
    left_out: dict[str, str] = {}
    tests: list[str] = []
    for id in dict.fromkeys(listed):
        if not id.isprintable():
            left_out[id.encode("ascii", "backslashreplace").decode()] = "unprintable name"
        elif looks_at_clock(id):
            left_out[id] = "measures time"
        else:
            tests.append(id)
    seconds = 0.0
    for again in range(2):
        await sandbox.reset(gold)
        # a deadline of its own: the second run shall be one, and not the first one's memory
        report = await sandbox.run_tests(tests, timeout_s=SUITE_S + again)
        if report.killed_by is not None:
            raise InputError(
                f"{gold.root.name}: all its {len(tests)} tests together exceed a limit of the "
                f"sandbox ({report.killed_by}); see sandbox.limits"
            )
        left_out |= {case.id: case.outcome for case in report.cases if case.outcome != "passed"}
        tests = [case.id for case in report.cases if case.outcome == "passed"]
        seconds = max(seconds, report.seconds)
    if not tests:
        raise InputError(f"{gold.root.name}: none of its tests passes")
    return Suite(gold.root.name, tuple(tests), left_out, working, round(seconds, 3))


def test_places(task: Judged, root: Path) -> list[str]:
    """Folders and files that hold the repository's tests, as pytest's arguments."""
    files = sorted({id.partition("::")[0] for id in (*task.fail_to_pass, *task.pass_to_pass)})
    own = [path for path in task.protected if path not in ALWAYS_PROTECTED and "*" not in path]
    places = [path for path in own if (root / path).exists()]
    if not places:
        places = sorted({str(PurePosixPath(file).parent) for file in files})
    # files of the task that pytest would not find there by itself
    for file in files:
        below = any(PurePosixPath(file).is_relative_to(place) for place in places)
        known = any(fnmatchcase(PurePosixPath(file).name, kind) for kind in _TEST_FILES)
        if not (below and known):
            places.append(file)
    return places


def build_of(module: str, tree: Tree) -> list[list[str]]:
    """Build commands of the package around `module`, the most thorough first."""
    root, inside = _root_of(module, tree.python_path)
    place = str(root / inside.parts[0]) if len(inside.parts) > 1 else module
    dotted = inside.with_suffix("").parts
    if dotted[-1] == "__init__":
        dotted = dotted[:-1]
    names = [".".join(dotted[:1]), ".".join(dotted)] if all(map(str.isidentifier, dotted)) else []
    names = list(dict.fromkeys(filter(None, names)))
    command = ["python3", "-c", _BUILD]
    commands = [[*command, place, *names], [*command, "", *names], [*command, place]]
    return commands if names else commands[2:]


def package_folder(module: str, python_path: Sequence[str]) -> str:
    """The folder of the outermost package that holds `module`; "" if it is in none.

    `src/pkg/sub/a.py` with `src` on the path lies in `src/pkg`.
    """
    root, inside = _root_of(module, python_path)
    return str(root / inside.parts[0]) if len(inside.parts) > 1 else ""


def _root_of(module: str, python_path: Sequence[str]) -> tuple[PurePosixPath, PurePosixPath]:
    """The deepest folder on the path that holds `module`, and the module's place in it."""
    path = PurePosixPath(module)
    roots = [PurePosixPath(os.path.normpath(entry)) for entry in python_path]
    best = max(
        (root for root in roots if path.parent.is_relative_to(root)),
        key=lambda root: len(root.parts),
        default=PurePosixPath("."),
    )
    return best, path.relative_to(best)
