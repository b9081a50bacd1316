"""What a release needed on the day it came out, pinned by hash."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InputError
from sandbox.candidates import Candidate, Dated
from sandbox.layout import metadata, package_of
from sandbox.needs import imported_by_tests
from sandbox.package_index import IndexUnreachable, PackageIndex
from sandbox.packages import Package, Release, fetch
from sandbox.wheels import Pin, have_wheels

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# the sandbox has these anyway
_PRESENT = frozenset({"pytest", "pluggy", "iniconfig", "packaging", "pygments"})
_MAX_PINS = 24


def prepare(candidate: Candidate, dated: Dated, index: PackageIndex) -> Package:
    """One release of a listed package, in the cache with the wheels it needs, ready for tests.

    Raises InputError when it cannot be had, holds no tests, or needs what no wheel of its day is.
    """
    release = Release(candidate.name, dated.version, dated.sha256)
    fetch([release])
    package = package_of(release, candidate.split, candidate.skip)
    wanted = imported_by_tests(package.tree, package.tests)
    pins = requirements_of(package.tree, dated.uploaded, candidate.extra, index, wanted)
    if pins:
        path = (*package.python_path, ".requirements")
        package = replace(package, requirements=pins, python_path=path)
    fetch([package])
    return package


def requirements_of(
    root: Path, day: str, extra: Iterable[str], index: PackageIndex, wanted: Iterable[str] = ()
) -> tuple[str, ...]:
    """Pins (`name==version --hash=sha256:…`) of the wheels that a release needs.

    For each requirement, and each of theirs, the newest release of that day (YYYY-MM-DD; "": any)
    which it allows. No backtracking: what does not go together shows in the tests. Raises
    InputError for a need that no pure-Python wheel of the day meets. Of what is `wanted`, too, that
    which cannot be had is left out, with what it needs.
    """
    pins = _resolve(_apply([*_declared(root), *extra]), {}, day, index)
    for name in wanted:
        try:
            pins = _resolve(_apply([name]), pins, day, index)
        except IndexUnreachable:
            raise
        except InputError:
            continue
    return tuple(str(pins[name]) for name in sorted(pins))


def _resolve(
    waiting: list[Requirement], known: dict[str, Pin], day: str, index: PackageIndex
) -> dict[str, Pin]:
    pins = dict(known)
    while waiting:
        requirement = waiting.pop(0)
        name = _plain(requirement.name)
        if name in _PRESENT:
            continue
        if name in pins:
            if not requirement.specifier.contains(pins[name].version, prereleases=True):
                raise InputError(f"needs {requirement} beside {name} {pins[name].version}")
            continue
        if len(pins) >= _MAX_PINS:
            raise InputError(f"needs more than {_MAX_PINS} other packages")
        pins[name] = pin = _newest(requirement, day, index)
        have_wheels([str(pin)], index)
        waiting += _apply(_declared_by(pin.path), requirement.extras)
    return pins


def _newest(requirement: Requirement, day: str, index: PackageIndex) -> Pin:
    from packaging.version import InvalidVersion, Version

    best: tuple[Version, Pin] | None = None
    for wheel in index.wheels(requirement.name):
        try:
            version = Version(wheel.version)
        except InvalidVersion:
            continue
        in_time = not day or not wheel.uploaded or wheel.uploaded <= day
        if not in_time or not wheel.sha256 or version.is_prerelease:
            continue
        if requirement.specifier.contains(version) and (best is None or version > best[0]):
            best = version, Pin(_plain(requirement.name), wheel.version, wheel.sha256)
    if best is None:
        raise InputError(f"needs {requirement}, and no pure-Python wheel of {day} is that")
    return best[1]


def _apply(texts: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements that hold for this interpreter."""
    from packaging.requirements import InvalidRequirement, Requirement

    found: list[Requirement] = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            raise InputError(f"cannot read the requirement {text!r}") from None
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.append(requirement)
    return found


def _declared(root: Path) -> list[str]:
    """Requirements as the metadata has them, or as setuptools wrote them beside it."""
    listed = metadata(root).get_all("Requires-Dist")
    if listed:
        return [str(text) for text in listed]
    for pattern in ("*.egg-info/requires.txt", "src/*.egg-info/requires.txt"):
        for file in sorted(root.glob(pattern)):
            text = file.read_text(encoding="utf-8", errors="replace")
            always = re.split(r"^\[", text, maxsplit=1, flags=re.M)[0]
            return [line.strip() for line in always.splitlines() if line.strip()]
    return []


def _declared_by(wheel: Path) -> list[str]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            facts = message_from_bytes(archive.read(names[0]) if names else b"")
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{wheel}: not a readable wheel: {error}") from error
    return [str(text) for text in facts.get_all("Requires-Dist", [])]


def _plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
