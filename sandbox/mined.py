"""The index of real bugs: one line of facts for each task, and the tasks made from it.

A line names two adjacent releases of a package by hash, and lines of their source diff. The task is
the newer release with those lines as they were in the older one; the SHA-256 of the changed files
proves that it is the bug that was verified. No line holds source text: even the issue's words are
read from the release's own change log.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import InputError
from sandbox.changelog import notes
from sandbox.hunks import Hunk, digest, read_source, take_back
from sandbox.packages import INDEX, Package, Release, load_packages
from sandbox.patch import make_patch
from sandbox.shipped import GroupedIds, ungroup
from sandbox.task import ALWAYS_PROTECTED, Task

RELEASES = INDEX / "releases.jsonl"
_SHOWN = 3

# path: [[first and last line in the newer file, in the older file]], as Python slices
Ranges = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Mined:
    """One line of the index.

    Attributes:
      old, version: the older release, and the newer one that repaired the bug; their sdists'
        SHA-256 are old_sha256 and sdist_sha256. uploaded: the newer one's date.
      operator: "fix" for one independent piece of the source diff, "release" for all of it.
      hunks: the lines taken back; lines: how many, the larger side of each hunk.
      sha256: over the changed files (`hunks.digest`).
      requirements: `name==version --hash=sha256:…`, wheels of the release's day.
      f2p, p2p, repeat, seconds: as in `shipped.Row`.
    """

    source: str
    name: str
    package: str
    old: str
    version: str
    old_sha256: str
    sdist_sha256: str
    uploaded: str
    split: str
    licence: str
    operator: str
    module: str
    function: str
    hunks: Ranges
    lines: int
    sha256: str
    package_source: list[str]
    tests: list[str]
    python_path: list[str]
    requirements: list[str]
    f2p: GroupedIds
    p2p: GroupedIds
    repeat: int
    seconds: float

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def releases(self) -> tuple[Release, Release]:
        """The newer release, ready for tests, and the older one."""
        known = load_packages().get(self.package)
        pins = tuple(self.requirements)
        if known is not None and (known.sha256, known.requirements) == (self.sdist_sha256, pins):
            newer: Release = known
        else:
            newer = Package(
                name=self.package,
                version=self.version,
                sha256=self.sdist_sha256,
                requirements=pins,
                licence=self.licence,
                split=self.split,
                source=tuple(self.package_source),
                tests=tuple(self.tests),
                python_path=tuple(self.python_path),
            )
        return newer, Release(self.package, self.old, self.old_sha256)


def build_mined(row: Mined) -> Task:
    """Make the task that a line describes; both releases must be in the cache.

    Raises InputError when the line does not fit the releases.
    """
    newer, older = row.releases
    hunks = [
        Hunk(path, (a0, a1), (b0, b1))
        for path, ranges in row.hunks.items()
        for a0, a1, b0, b1 in ranges
    ]
    try:
        new, old = (read_source(release.tree, row.hunks) for release in (newer, older))
        buggy = take_back(hunks, new, old)
    except InputError as error:
        raise InputError(f"task {row.name}: {error}") from None
    if digest(buggy) != row.sha256:
        raise InputError(
            f"task {row.name}: its line does not give the files it was recorded with: the line "
            "has changed; make the index again"
        )
    fail_to_pass = ungroup(row.f2p)
    tests = (pattern for path in row.tests for pattern in (path, f"{path}/*"))
    return Task(
        name=row.name,
        source="release",
        split=row.split,
        package=row.package,
        version=row.version,
        sdist_sha256=row.sdist_sha256,
        licence=row.licence,
        module=row.module,
        function=row.function,
        operator=row.operator,
        instruction=instruction(row, notes(newer.tree, row.version), fail_to_pass),
        fail_to_pass=fail_to_pass,
        pass_to_pass=ungroup(row.p2p),
        python_path=tuple(row.python_path),
        bug_patch=make_patch(new, buggy),
        protected=(*tests, *ALWAYS_PROTECTED),
        requirements=tuple(row.requirements),
    )


def instruction(row: Mined, notes: str, failing: tuple[str, ...]) -> str:
    """What the agent is told: what the release's own notes say, which tests fail, and where."""
    shown = "\n".join(f"- {id}" for id in failing[:_SHOWN])
    more = f"\n- and {len(failing) - _SHOWN} more" if len(failing) > _SHOWN else ""
    where = f" in `{row.module}`" if len(row.hunks) == 1 else ""
    said = f"The notes of {row.package} {row.version} say:\n{notes}\n" if notes else ""
    return (
        f"Tests of {row.package} fail because of a bug{where}.\n"
        f"{said}Failing:\n{shown}{more}\n"
        "Fix the source; do not change the tests."
    )


def ranges(hunks: Iterable[Hunk]) -> Ranges:
    """Hunks as the index holds them."""
    found: Ranges = {}
    for hunk in sorted(hunks):
        found.setdefault(hunk.path, []).append([*hunk.new, *hunk.old])
    return found
