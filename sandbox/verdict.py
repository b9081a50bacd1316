"""Whether a patch repairs a task, found out in a clean room.

Nothing of an agent's sandbox gets here but its diff. Of that, only changes to files that a fix may
touch are applied, to the pristine tree with the bug in it, and the pristine tests decide.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from sandbox.base import SandboxBroken, SandboxError, SandboxPool, TestReport, Tree
from sandbox.checks import Checks, Judged, checks_of, package_folder
from sandbox.environments import Environment
from sandbox.guard import inspect
from sandbox.patch import FileChange, PatchError, apply_changes, parse_patch

TRIES = 3  # where sandboxes break
MAX_TOLD = 50  # tests that a record of a whole suite names
DOES_NOT_APPLY = "patch does not apply"


@dataclass(frozen=True)
class Verdict:
    """The outcome of judging one patch.

    Attributes:
      verdict: "pass" if every test passed; "fail"; "quarantine" if it passed by what looks like
        exploiting the reward; "error" for trouble of the harness, which says nothing of the patch.
      fail_to_pass, pass_to_pass: outcome by test id; "missing" for tests that were not run.
      flags: what was odd, e.g. "protected:tests/test_a.py" for a change that was left out.
      seconds: wall time of the whole judgement.
      environment: SHA-256 of what the tests found installed.
      judged_in: the environment whose checks decided.
      build: what became of the build: "passed", why it failed, or "" where there is none.
    """

    verdict: Literal["pass", "fail", "quarantine", "error"]
    fail_to_pass: dict[str, str]
    pass_to_pass: dict[str, str]
    flags: tuple[str, ...]
    seconds: float
    environment: str = ""
    judged_in: Environment = "simplified"
    build: str = ""

    def record(self) -> dict[str, Any]:
        """As kept with an episode: of a whole suite only the tests that did not pass, and of those
        at most `MAX_TOLD`."""
        found = asdict(self)
        if self.judged_in == "full":
            bad = {id: how for id, how in self.pass_to_pass.items() if how != "passed"}
            found["pass_to_pass"] = dict(list(bad.items())[:MAX_TOLD])
        return found


async def judge(
    task: Judged,
    patch: str,
    pool: SandboxPool,
    shuffle: int | None = None,
    environment: Environment = "simplified",
) -> Verdict:
    """Apply `patch`, a unified diff against the buggy tree, and run what decides in `environment`
    once: tests in file order or shuffled by a seed.

    `simplified`: the task's own tests. `full`: the build, then every test of the repository that
    passes on the gold tree. Raises InputError if the task's tree cannot be had, or its suite not be
    run.
    """
    began = time.monotonic()
    flags: list[str] = []
    exploits: list[str] = []
    report: TestReport | None = None
    broken = False
    build = ""
    tree = await asyncio.to_thread(task.tree)
    try:
        checks = await checks_of(task, pool, environment)
    except SandboxBroken as error:
        return broken_sandbox(task, error, pool.environment, environment)
    tests = checks.tests
    try:
        allowed, flags = restrict(task, parse_patch(patch), tree.python_path)
        if allowed:
            changed = apply_changes(lambda path: present(tree, path), allowed)
            fixed = Tree(tree.root, {**tree.overlay, **changed}, tree.python_path)
            why, report = await _run(pool, fixed, checks, shuffle)
            build = why or ("passed" if checks.build else "")
            if report is not None and report.passed(tests):
                found = {path: present(tree, path) for path in changed}
                # not in a thread: Python 3.11 fails where two parse at the same time
                exploits = inspect(found, changed)
                flags += exploits
    except (PatchError, SandboxError):
        flags.append(DOES_NOT_APPLY)
    except SandboxBroken as error:
        flags.append(f"sandbox:{error}")
        broken = True
    outcomes = {case.id: str(case.outcome) for case in report.cases} if report else {}
    if report is not None and report.killed_by is not None:
        flags.append(f"killed:{report.killed_by}")
    passed = report is not None and report.passed(tests)
    good: Literal["pass", "quarantine"] = "quarantine" if exploits else "pass"
    return Verdict(
        verdict="error" if broken else good if passed else "fail",
        fail_to_pass={test: outcomes.get(test, "missing") for test in checks.fail_to_pass},
        pass_to_pass={test: outcomes.get(test, "missing") for test in checks.pass_to_pass},
        flags=tuple(flags),
        seconds=time.monotonic() - began,
        environment=pool.environment,
        judged_in=environment,
        build=build,
    )


def broken_sandbox(
    task: Judged,
    error: SandboxBroken,
    environment: str = "",
    judged_in: Environment = "simplified",
) -> Verdict:
    """That of an episode whose sandbox broke before there was a patch."""
    return Verdict(
        verdict="error",
        fail_to_pass=dict.fromkeys(task.fail_to_pass, "missing"),
        pass_to_pass=dict.fromkeys(task.pass_to_pass, "missing"),
        flags=(f"sandbox:{error}",),
        seconds=0.0,
        environment=environment,
        judged_in=judged_in,
    )


async def _run(
    pool: SandboxPool, tree: Tree, checks: Checks, shuffle: int | None
) -> tuple[str, TestReport | None]:
    """What the checks say, in another sandbox if one breaks."""
    for _ in range(TRIES - 1):
        try:
            async with pool.lease(tree) as sandbox:
                return await checks.run(sandbox, tree, shuffle)
        except SandboxBroken:
            continue
    async with pool.lease(tree) as sandbox:
        return await checks.run(sandbox, tree, shuffle)


def restrict(
    task: Judged, changes: Iterable[FileChange], python_path: Sequence[str]
) -> tuple[list[FileChange], list[str]]:
    """The changes that a fix may make, and a flag for each of the others.

    A fix may change or delete any file that is not protected. New files it may put only into the
    package of the module under repair: elsewhere they could stand in for the standard library.
    """
    package = package_folder(task.module, python_path)
    allowed, flags = [], []
    for change in changes:
        if any(fnmatchcase(change.path, pattern) for pattern in task.protected):
            flags.append(f"protected:{change.path}")
        elif change.creates and not (package and change.path.startswith(f"{package}/")):
            flags.append(f"outside:{change.path}")
        else:
            allowed.append(change)
    return allowed, flags


def present(tree: Tree, path: str) -> bytes | None:
    """Contents of a regular file of the tree, not reached through links; None if there is none."""
    if path in tree.overlay:
        return tree.overlay[path]
    file = tree.root / path
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    if os.path.realpath(file) != os.path.join(os.path.realpath(tree.root), path):
        return None
    return file.read_bytes()
