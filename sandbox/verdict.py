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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal, Protocol

from sandbox.base import SandboxBroken, SandboxError, SandboxPool, TestReport, Tree
from sandbox.guard import inspect
from sandbox.patch import FileChange, PatchError, apply_changes, parse_patch

TRIES = 3  # where sandboxes break
DOES_NOT_APPLY = "patch does not apply"


class Judged(Protocol):
    """What of a task the verdict depends on; see `sandbox.task.Task`."""

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
class Verdict:
    """The outcome of judging one patch.

    Attributes:
      verdict: "pass" if every test passed; "fail"; "quarantine" if it passed by what looks like
        exploiting the reward; "error" for trouble of the harness, which says nothing of the patch.
      fail_to_pass, pass_to_pass: outcome by test id; "missing" for tests that were not run.
      flags: what was odd, e.g. "protected:tests/test_a.py" for a change that was left out.
      seconds: wall time of the whole judgement.
      environment: SHA-256 of what the tests found installed.
    """

    verdict: Literal["pass", "fail", "quarantine", "error"]
    fail_to_pass: dict[str, str]
    pass_to_pass: dict[str, str]
    flags: tuple[str, ...]
    seconds: float
    environment: str = ""


async def judge(task: Judged, patch: str, pool: SandboxPool, shuffle: int | None = None) -> Verdict:
    """Apply `patch`, a unified diff against the buggy tree, and run all tests of the task once, in
    file order or shuffled by a seed.

    Raises InputError if the task's tree cannot be had.
    """
    began = time.monotonic()
    flags: list[str] = []
    exploits: list[str] = []
    report: TestReport | None = None
    broken = False
    tree = await asyncio.to_thread(task.tree)
    tests = (*task.fail_to_pass, *task.pass_to_pass)
    try:
        allowed, flags = restrict(task, parse_patch(patch), tree.python_path)
        if allowed:
            changed = apply_changes(lambda path: present(tree, path), allowed)
            fixed = Tree(tree.root, {**tree.overlay, **changed}, tree.python_path)
            report = await _run(pool, fixed, tests, shuffle)
            if report.passed(tests):
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
        fail_to_pass={test: outcomes.get(test, "missing") for test in task.fail_to_pass},
        pass_to_pass={test: outcomes.get(test, "missing") for test in task.pass_to_pass},
        flags=tuple(flags),
        seconds=time.monotonic() - began,
        environment=pool.environment,
    )


def broken_sandbox(task: Judged, error: SandboxBroken, environment: str = "") -> Verdict:
    """That of an episode whose sandbox broke before there was a patch."""
    return Verdict(
        verdict="error",
        fail_to_pass=dict.fromkeys(task.fail_to_pass, "missing"),
        pass_to_pass=dict.fromkeys(task.pass_to_pass, "missing"),
        flags=(f"sandbox:{error}",),
        seconds=0.0,
        environment=environment,
    )


async def _run(
    pool: SandboxPool, tree: Tree, tests: Sequence[str], shuffle: int | None
) -> TestReport:
    """The tests' report, in another sandbox if one breaks."""
    for _ in range(TRIES - 1):
        try:
            async with pool.lease(tree) as sandbox:
                return await sandbox.run_tests(tests, shuffle=shuffle)
        except SandboxBroken:
            continue
    async with pool.lease(tree) as sandbox:
        return await sandbox.run_tests(tests, shuffle=shuffle)


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


def package_folder(module: str, python_path: Sequence[str]) -> str:
    """The folder of the outermost package that holds `module`; "" if it is in none.

    `src/pkg/sub/a.py` with `src` on the path lies in `src/pkg`.
    """
    folder = PurePosixPath(module).parent
    roots = [PurePosixPath(os.path.normpath(entry)) for entry in python_path]
    best = max(
        (root for root in roots if folder.is_relative_to(root)),
        key=lambda root: len(root.parts),
        default=PurePosixPath("."),
    )
    inside = folder.relative_to(best).parts
    return str(best / inside[0]) if inside else ""


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
