"""What a release needed on the day it came out, pinned by hash."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from configs.errors import InputError
from sandbox.layout import metadata
from sandbox.package_index import PackageIndex

# the sandbox has these anyway
_PRESENT = frozenset({"pytest", "pluggy", "iniconfig", "packaging", "pygments"})


def requirements_of(
    root: Path, day: str, extra: Iterable[str], index: PackageIndex
) -> tuple[str, ...]:
    """Pins (`name==version --hash=sha256:…`) of the wheels that a release needs.

    For each requirement, and each of theirs, the newest release of that day which it allows. No
    backtracking: what does not go together shows in the tests. Raises InputError for a need that
    no pure-Python wheel of the day meets.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    named = [*_declared(root), *extra]
    needed: list[Requirement] = []
    for text in named:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            raise InputError(f"cannot read the requirement {text!r}") from None
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed.append(requirement)
    wanted = [r for r in needed if r.name.lower().replace("_", "-") not in _PRESENT]
    if wanted:
        raise InputError(f"needs {', '.join(sorted(r.name for r in wanted))}")
    return ()


def _declared(root: Path) -> list[str]:
    """Requirements as the metadata has them, or as setuptools wrote them beside it."""
    listed = metadata(root).get_all("Requires-Dist")
    if listed:
        return [str(text) for text in listed]
    for file in sorted([*root.glob("*.egg-info/requires.txt"), *root.glob("src/*.egg-info/requires.txt")]):
        text = file.read_text(encoding="utf-8", errors="replace")
        plain = re.split(r"^\[", text, maxsplit=1, flags=re.M)[0]
        return [line.strip() for line in plain.splitlines() if line.strip()]
    return []
