"""The shipped task index: one line of facts for each task, and the tasks made from it.

A line names a release, a function, an operator and which of that function's mutations it is. No
line holds source text: the bug is made again from the release, and the SHA-256 of the mutated file
proves that it is the same bug.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from configs.errors import InputError
from sandbox.mutate import apply, mutations
from sandbox.packages import INDEX, Package, load_packages
from sandbox.patch import make_patch
from sandbox.task import ALWAYS_PROTECTED, Task

SHIPPED = INDEX / "tasks.jsonl"
_SHOWN = 1

T = TypeVar("T")
GroupedIds = dict[str, list[str]]


@dataclass(frozen=True)
class Row:
    """One line of the index.

    Attributes:
      ordinal: which of `mutations(source, function)`.
      sha256: of the mutated file.
      f2p, p2p: test names by test file (an id is `file::name`).
      repeat: how often the bug was seen to fail, and the release to pass.
      seconds: one run of these tests, pytest's start left out, where the index was made.
    """

    name: str
    package: str
    version: str
    split: str
    module: str
    function: str
    operator: str
    ordinal: int
    sha256: str
    f2p: GroupedIds
    p2p: GroupedIds
    repeat: int
    seconds: float

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def release(self) -> Package | None:
        """The pinned package that it names, if there is that one."""
        package = load_packages().get(self.package)
        return package if package is not None and package.version == self.version else None


@dataclass(frozen=True)
class Made(Row):
    """A line whose package is not one of the pinned ones: it says all about the release."""

    source: str
    sdist_sha256: str
    licence: str
    package_source: list[str]
    tests: list[str]
    python_path: list[str]
    requirements: list[str]

    @property
    def release(self) -> Package:
        return Package(
            name=self.package,
            version=self.version,
            sha256=self.sdist_sha256,
            requirements=tuple(self.requirements),
            licence=self.licence,
            split=self.split,
            source=tuple(self.package_source),
            tests=tuple(self.tests),
            python_path=tuple(self.python_path),
        )


def row_from(kind: type[T], record: dict[str, Any], where: str) -> T:
    """A line as the dataclass `kind`. Raises InputError when a field is missing or impossible."""
    known = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    wrong = [
        name
        for name in {*known, *record}
        if name not in known or not _fits(record.get(name), known[name])
    ]
    if wrong:
        raise InputError(f"{where}: missing or impossible: {', '.join(sorted(wrong))}")
    return kind(**record)


def _fits(value: object, kind: str) -> bool:
    """Whether a JSON value is of the kind that a field's annotation names."""
    if kind == "GroupedIds":
        groups = value.values() if isinstance(value, dict) else [None]
        return all(_fits(group, "list[str]") for group in groups)
    if kind == "Ranges":
        listed = value.values() if isinstance(value, dict) and value else [None]
        return all(
            isinstance(some, list) and all(isinstance(r, list) and _range(r) for r in some)
            for some in listed
        )
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, {"str": str, "int": int, "float": float | int}[kind])


def _range(numbers: list[Any]) -> bool:
    """Two slices: four line numbers, each start before its end."""
    whole = len(numbers) == 4 and all(type(n) is int and n >= 0 for n in numbers)
    return whole and numbers[0] <= numbers[1] and numbers[2] <= numbers[3]


def build(row: Row) -> Task:
    """Make the task that a line describes; its release must be in the cache.

    Raises InputError when the line does not fit the release: it was changed, or mutate.py was.
    """
    package = row.release
    if package is None:
        raise InputError(f"task {row.name}: {row.package} {row.version} is not in the packages")
    path = package.tree / row.module
    if not path.is_relative_to(package.tree) or ".." in path.parts or not path.is_file():
        raise InputError(f"task {row.name}: {row.package} has no file {row.module}")
    pristine = path.read_bytes()
    source = pristine.decode("utf-8")
    edits = mutations(source, row.function)
    buggy = b""
    if 0 <= row.ordinal < len(edits) and edits[row.ordinal].operator == row.operator:
        buggy = apply(source, edits[row.ordinal]).encode()
    if hashlib.sha256(buggy).hexdigest() != row.sha256:
        raise InputError(
            f"task {row.name}: its line does not give the mutated file it was recorded with: "
            "the line or the mutation engine has changed; make the index again"
        )
    patch = make_patch({row.module: pristine}, {row.module: buggy})
    return make_task(package, row, patch)


def make_task(package: Package, row: Row, patch: str) -> Task:
    """The task of a line, given its bug as a patch."""
    fail_to_pass = ungroup(row.f2p)
    tests = (pattern for path in package.tests for pattern in (path, f"{path}/*"))
    return Task(
        name=row.name,
        source="procedural",
        split=row.split,
        package=package.name,
        version=package.version,
        sdist_sha256=package.sha256,
        licence=package.licence,
        module=row.module,
        function=row.function,
        operator=row.operator,
        instruction=instruction(row.module, row.function, fail_to_pass),
        fail_to_pass=fail_to_pass,
        pass_to_pass=ungroup(row.p2p),
        python_path=package.python_path,
        bug_patch=patch,
        protected=(*tests, *ALWAYS_PROTECTED),
        requirements=package.requirements,
    )


def instruction(module: str, function: str, failing: tuple[str, ...]) -> str:
    """What the agent is told: where, which tests, and what to leave alone."""
    shown = ", ".join(failing[:_SHOWN])
    more = f" and {len(failing) - _SHOWN} more" if len(failing) > _SHOWN else ""
    return (
        f"Tests fail because of a bug in `{function}` in `{module}`.\n"
        f"Failing: {shown}{more}\n"
        "Fix the source; do not change the tests."
    )


def task_name(package: str, function: str, operator: str, sha256: str) -> str:
    """A readable name that is unique: the mutated file's hash is in it."""
    slug = re.sub(r"[^a-z0-9]+", "-", function.lower()).strip("-")
    return f"{package}-{slug}-{operator}-{sha256[:6]}"


def group(ids: Iterable[str]) -> GroupedIds:
    """Test ids by file, each without its file."""
    grouped: GroupedIds = {}
    for id in ids:
        path, _, name = id.partition("::")
        grouped.setdefault(path, []).append(name)
    return grouped


def ungroup(grouped: GroupedIds) -> tuple[str, ...]:
    return tuple(f"{path}::{name}" for path, names in grouped.items() for name in names)
