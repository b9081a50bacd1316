"""One line of somebody's dataset, as a task: with its source tree here, or for a container image.

Each format's own module reads its fields into an `Issue`; all that follows is the same for them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

from configs.errors import InputError
from sandbox.importers.carried import (
    Files,
    carry,
    head,
    is_repository,
    licence_of,
    read_commit,
    read_folder,
)
from sandbox.mutate import functions
from sandbox.patch import BeyondText, apply_patch, make_patch, parse_patch
from sandbox.taken_back import function_at
from sandbox.task import ALWAYS_PROTECTED, Task
from sandbox.wheels import FOLDER as REQUIREMENTS

_SHOWN = 3
_UNITTEST = re.compile(r"(?P<test>\w+) \((?P<place>[\w.]+)\)")


@dataclass(frozen=True)
class Issue:
    """What a row says.

    Attributes:
      commit: where patches apply; "" where the row names none.
      fix, bug: one of them is a unified diff: from the bug to the fix, or the other way.
      tests_patch: the diff that brings the tests; "" if they are there.
      test_files: files that bring the tests, by path.
      fail_to_pass, pass_to_pass: names of tests as the row has them.
      image: the container image that the row's tests ran in; "" if the row names none.
      facts: what else the row says of its origin.
    """

    format: str
    name: str
    repo: str
    commit: str
    problem: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    image: str
    fix: str = ""
    bug: str = ""
    tests_patch: str = ""
    test_files: Files = field(default_factory=dict)
    licence: str = ""
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def package(self) -> str:
        return slug(self.repo)

    @property
    def changed(self) -> list[str]:
        """The files that differ between bug and fix, in the patch's order."""
        return named_in(self.fix or self.bug)

    @property
    def brought(self) -> list[str]:
        """The files that bring the tests."""
        return [*named_in(self.tests_patch), *self.test_files]

    @property
    def provenance(self) -> tuple[str, ...]:
        told = {"format": self.format, "instance_id": self.name, "repo": self.repo}
        told |= {"commit": self.commit, "image": self.image, **dict(self.facts)}
        return tuple(f"{key}={value}" for key, value in told.items() if value)


# -- reading fields


def text(record: dict[str, Any], *keys: str, default: str | None = None) -> str:
    """The first of some fields that is there: a text, not empty. InputError if none is."""
    for key in keys:
        value = record.get(key)
        if value not in (None, ""):
            if not isinstance(value, str):
                raise InputError(f"{key} is not text: {str(value)[:60]!r}")
            return value
    if default is None:
        raise InputError(f"{' or '.join(keys)} is missing")
    return default


def names(record: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of test names: a JSON array, or (as SWE-bench has it) the text of one."""
    value = record.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{key} is not a list: {value[:60]!r}") from None
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise InputError(f"{key} is missing or is not a list of test names")
    return tuple(dict.fromkeys(value))


def some_names(record: dict[str, Any], key: str) -> tuple[str, ...]:
    """As `names`, and not empty."""
    found = names(record, key)
    if not found:
        raise InputError(f"{key} is empty: a task needs a failing test")
    return found


def diff(record: dict[str, Any], key: str, empty: bool = False) -> str:
    """A unified diff; "" only if it may be `empty`. InputError for anything else.

    It may do what only git can: rename files, or change binary ones. Not where its tree is here.
    """
    patch = text(record, key, default="" if empty else None)
    patch += "" if patch.endswith("\n") or not patch else "\n"
    try:
        if not parse_patch(patch) and not empty:
            raise InputError("it changes nothing")
    except BeyondText:
        return patch
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    return patch


def named_in(patch: str) -> list[str]:
    """The files that a diff names, whatever it does to them."""
    old_and_new = re.findall(r"^--- (?:a/)?(.+?)\t?\n\+\+\+ (?:b/)?(.+?)\t?$", patch, re.M)
    return [new if new != "/dev/null" else old for old, new in old_and_new]


def commit(record: dict[str, Any], key: str) -> str:
    """A commit's hash. InputError for anything else: it becomes a command's argument."""
    value = text(record, key)
    if not re.fullmatch("[0-9a-f]{7,40}", value):
        raise InputError(f"{key} is not a commit: {value[:60]!r}")
    return value


def slug(name: str) -> str:
    """A name as part of a file name: `owner/project` is `owner__project`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.strip().replace("/", "__")).strip("-._")[:100]


# -- a task with its tree


def with_tree(issue: Issue, checkout: Path, split: str, requirements: tuple[str, ...]) -> Task:
    """The task over the row's own commit, taken from a local checkout (a git repository, or a
    folder that is taken as it is).

    Raises InputError when a patch does not fit the tree, or its tests are not pytest's.
    """
    if is_repository(checkout):
        base = read_commit(checkout, issue.commit or head(checkout))
    else:
        base = read_folder(checkout)
    tested = _changed(base, issue.tests_patch, "test_patch") | dict(issue.test_files)
    pristine = _changed(tested, issue.fix, "patch")
    buggy = _changed(tested, issue.bug, "patch")
    brought = issue.brought
    fail_to_pass = pytest_ids(issue.fail_to_pass, pristine, brought)
    pass_to_pass = pytest_ids(issue.pass_to_pass, pristine, brought)
    tests = sorted({id.partition("::")[0] for id in (*fail_to_pass, *pass_to_pass)} | {*brought})
    # the folders say where the whole suite is (sandbox.checks.test_places)
    protected = (*sorted({*tests, *_test_folders(pristine)}), *ALWAYS_PROTECTED)
    modules = [
        path
        for path in issue.changed
        if path.endswith(".py") and not any(fnmatchcase(path, pattern) for pattern in protected)
    ]
    if not modules:
        raise InputError("its patch changes no Python source but tests and settings")
    # one that is there to be looked at
    module = next((path for path in modules if path in buggy), modules[0])
    release = carry(issue.package, issue.commit[:12] or "tree", pristine, requirements)
    old, new = ({p: tree[p] for p in issue.changed if p in tree} for tree in (pristine, buggy))
    return Task(
        name=issue.name,
        source="imported",
        split=split,
        package=issue.package,
        version=release.version,
        sdist_sha256=release.sha256,
        licence=issue.licence or licence_of(pristine),
        module=module,
        function=changed_function(new.get(module, b""), old.get(module, b"")),
        operator="fix",
        instruction=instruction(issue.problem, fail_to_pass),
        fail_to_pass=fail_to_pass,
        pass_to_pass=pass_to_pass,
        python_path=_python_path(pristine, requirements),
        bug_patch=make_patch(old, new),
        protected=protected,
        requirements=requirements,
        origin="carried",
        provenance=issue.provenance,
    )


def _test_folders(files: Files) -> set[str]:
    """The outermost folders of tests that hold Python files."""
    found = set()
    for path in files:
        folders = PurePosixPath(path).parts[:-1] if path.endswith(".py") else ()
        named = [n for n, name in enumerate(folders) if name in ("tests", "test", "testing")]
        if named:
            found.add("/".join(folders[: named[0] + 1]))
    return found


def instruction(problem: str, failing: Sequence[str]) -> str:
    """What the agent is told: the issue, and which tests show it."""
    shown = "\n".join(f"- {id}" for id in failing[:_SHOWN])
    more = f"\n- and {len(failing) - _SHOWN} more" if len(failing) > _SHOWN else ""
    return f"{problem.strip()}\n\nFailing:\n{shown}{more}\nFix the source; do not change the tests."


def changed_function(buggy: bytes, fixed: bytes) -> str:
    """Qualified name of the function in which two versions of a module begin to differ."""
    pairs = zip_longest(buggy.split(b"\n"), fixed.split(b"\n"))
    line = next((at for at, (old, new) in enumerate(pairs, start=1) if old != new), 1)
    return function_at(buggy, line)


def _changed(files: dict[str, bytes], patch: str, what: str) -> dict[str, bytes]:
    try:
        changed = apply_patch(files, patch)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    return {p: data for p, data in {**files, **changed}.items() if data is not None}


def _python_path(files: Files, requirements: tuple[str, ...]) -> tuple[str, ...]:
    source = any(path.startswith("src/") and path.endswith(".py") for path in files)
    return (*(["src"] if source else []), ".", *([REQUIREMENTS] if requirements else []))


# -- names of tests


def pytest_ids(names: Sequence[str], files: Files, brought: Sequence[str]) -> tuple[str, ...]:
    """Names of tests as pytest ids. They may be such; or `test (package.module.Class)`, as unittest
    prints them; or `test` and `Class.test` alone, found in the files that the row brings.

    Raises InputError for one that names nothing in the tree.
    """
    defined = _Defined(files, brought)
    return tuple(dict.fromkeys(_pytest_id(name, files, defined) for name in names))


def _pytest_id(name: str, files: Files, defined: _Defined) -> str:
    path, _, rest = name.partition("::")
    if rest and path in files:
        return name
    if found := _UNITTEST.fullmatch(name):
        test, parts = found["test"], found["place"].split(".")
        parts = parts[:-1] if parts[-1] == test else parts
        for count in range(len(parts), 0, -1):
            for base in ("", "tests/"):
                file = f"{base}{'/'.join(parts[:count])}.py"
                if file in files:
                    return "::".join((file, *parts[count:], test))
    bare, bracket, parameters = name.partition("[")
    if file := defined.file_of(bare):
        return f"{file}::{bare.replace('.', '::')}{bracket}{parameters}"
    raise InputError(f"{name!r} names no test of this tree that pytest could run")


class _Defined:
    """Which file defines which test, of some files; read when first asked."""

    def __init__(self, files: Files, paths: Sequence[str]) -> None:
        self._files, self._paths = files, paths
        self._found: dict[str, str] | None = None

    def file_of(self, name: str) -> str:
        """`test` or `Class.test`: its file; "" for none."""
        if self._found is None:
            self._found = {}
            for path in self._paths:
                with contextlib.suppress(InputError, UnicodeDecodeError):
                    for span in functions(self._files.get(path, b"").decode("utf-8")):
                        self._found.setdefault(span.name, path)
        return self._found.get(name, "")
