"""The source diff between two releases, in pieces that can be taken back one by one.

A hunk says which lines of the newer file stand for which lines of the older one. A bug is a set of
hunks taken back in the newer release. Hunks are line numbers: the text comes from the releases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from sandbox.layout import is_test
from sandbox.packages import Package
from sandbox.patch import is_text, opcodes, split_lines

MAX_FILE_LINES = 12_000


@dataclass(frozen=True, order=True)
class Hunk:
    """Lines `new[0]:new[1]` of the newer file stand where `old[0]:old[1]` stood in the older."""

    path: str
    new: tuple[int, int]
    old: tuple[int, int]

    @property
    def lines(self) -> int:
        """How large it is: lines removed or added, whichever are more."""
        return max(self.new[1] - self.new[0], self.old[1] - self.old[0])


def source_files(package: Package) -> dict[str, bytes]:
    """Python source of a release, by path in its tree; no tests, no binary files."""
    found: dict[str, bytes] = {}
    for entry in package.source:
        top = package.tree / entry
        for file in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            path = file.relative_to(package.tree).as_posix()
            if not is_test(path, package.tests) and file.is_file():
                data = file.read_bytes()
                if is_text(data):
                    found[path] = data
    return found


def hunks_between(
    new: Mapping[str, bytes], old: Mapping[str, bytes], versions: tuple[str, str]
) -> list[Hunk]:
    """All hunks of files that both have, but for those that change nothing that runs.

    Left out: comments and blank lines alone, and a version number alone (`versions`: new, old).
    Raises InputError for a file too long to compare.
    """
    found: list[Hunk] = []
    for path in sorted(new.keys() & old.keys()):
        if new[path] == old[path]:
            continue
        a, b = split_lines(new[path]), split_lines(old[path])
        if max(len(a), len(b)) > MAX_FILE_LINES:
            raise InputError(f"{path}: more than {MAX_FILE_LINES} lines")
        for tag, a0, a1, b0, b1 in opcodes(a, b):
            if tag != "equal" and not _idle(a[a0:a1], b[b0:b1], versions):
                found.append(Hunk(path, (a0, a1), (b0, b1)))
    return found


def _idle(new: Sequence[str], old: Sequence[str], versions: tuple[str, str]) -> bool:
    """Whether a hunk changes comments, blank lines or a version number only."""

    def code(lines: Sequence[str], version: str) -> list[str]:
        bare = (line.strip() for line in lines)
        spoken = ", ".join(version.split("."))
        return [
            line.replace(version, "VERSION").replace(spoken, "VERSION")
            for line in bare
            if line and not line.startswith("#")
        ]

    return code(new, versions[0]) == code(old, versions[1])


def take_back(
    hunks: Iterable[Hunk], new: Mapping[str, bytes], old: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The changed files of the newer release with these hunks taken back.

    Raises InputError when a hunk does not fit the files.
    """
    by_path: dict[str, list[Hunk]] = {}
    for hunk in hunks:
        by_path.setdefault(hunk.path, []).append(hunk)
    changed: dict[str, bytes] = {}
    for path, some in by_path.items():
        if path not in new or path not in old:
            raise InputError(f"{path} is not in both releases")
        a, b = split_lines(new[path]), split_lines(old[path])
        for hunk in sorted(some, reverse=True):  # from the end: earlier line numbers stay true
            (a0, a1), (b0, b1) = hunk.new, hunk.old
            if not (0 <= a0 <= a1 <= len(a) and 0 <= b0 <= b1 <= len(b)):
                raise InputError(f"{path} has no lines {a0}-{a1}")
            a[a0:a1] = b[b0:b1]
        changed[path] = "".join(a).encode()
    return changed


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over paths and contents."""
    total = hashlib.sha256()
    for path in sorted(files):
        for part in (path.encode(), files[path]):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def read_source(root: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """Files of a tree. Raises InputError for one that is not there or leads out of it."""
    found: dict[str, bytes] = {}
    for path in paths:
        file = root / path
        if ".." in path.split("/") or path.startswith("/") or not file.is_file():
            raise InputError(f"{root.name} has no file {path}")
        found[path] = file.read_bytes()
    return found
