"""What lies where in the unpacked sdist of a release that nobody has described by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

from configs.errors import InputError
from sandbox.packages import Package, Release

_TEST_FOLDERS = ("tests", "test", "testing")
_NO_SOURCE = frozenset(
    "doc docs example examples benchmark benchmarks bench scripts tools ci build dist utils "
    "setup conftest noxfile tasks fabfile versioneer ez_setup".split()
)
_TEST_FILE = re.compile(r"tests?|test_.*|.*_tests?")
_CHANGELOG = re.compile(r"(changes|changelog|history|news|releases?|release_notes)(\.\w+)?", re.I)
_OSI = {"MIT License": "MIT", "Apache Software License": "Apache-2.0", "BSD License": "BSD"}


@dataclass(frozen=True)
class Layout:
    """Folders and files of a release, relative to its tree; the fields are `Package`'s."""

    source: tuple[str, ...]
    tests: tuple[str, ...]
    python_path: tuple[str, ...]
    licence: str


def package_of(release: Release, split: str, skip: tuple[str, ...] = ()) -> Package:
    """The release as a package that tasks can be made from; its tree must be in the cache.

    Raises InputError when its tree holds no tests or no modules.
    """
    found = layout(release.tree)
    return Package(
        name=release.name,
        version=release.version,
        sha256=release.sha256,
        licence=found.licence,
        split=split,
        source=found.source,
        tests=found.tests,
        python_path=found.python_path,
        skip=tuple(path for path in skip if (release.tree / path).exists()),
    )


def layout(root: Path) -> Layout:
    """Find modules and tests. Raises InputError when there are none."""
    path = "src" if _modules(root / "src") else "."
    home = root / path
    source = [entry.relative_to(root).as_posix() for entry in _modules(home)]
    if not source:
        raise InputError("no modules in the sdist")
    tests = [
        folder.relative_to(root).as_posix()
        for base in (root, *(root / entry for entry in source))
        for name in _TEST_FOLDERS
        if (folder := base / name).is_dir() and _has_tests(folder)
    ]
    for base in (root, *(root / entry for entry in source)):
        if base.is_dir():
            tests += [
                file.relative_to(root).as_posix()
                for file in sorted(base.glob("*.py"))
                if _TEST_FILE.fullmatch(file.stem)
            ]
    if not tests:
        raise InputError("no tests in the sdist")
    return Layout(tuple(source), tuple(dict.fromkeys(tests)), (path,), licence(root))


def is_test(path: str, tests: Iterable[str]) -> bool:
    """Whether a path of the tree is one of its tests, or belongs to them."""
    parts = path.split("/")
    return (
        any(path == test or path.startswith(f"{test}/") for test in tests)
        or any(part in _TEST_FOLDERS for part in parts[:-1])
        or parts[-1] == "conftest.py"
        or bool(_TEST_FILE.fullmatch(parts[-1].removesuffix(".py")))
    )


def changelogs(root: Path) -> list[Path]:
    """Files that tell what changed from release to release."""
    folders = (root, root / "docs", root / "doc", root / "docs" / "source")
    return [
        file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.is_file() and _CHANGELOG.fullmatch(file.name)
    ]


def metadata(root: Path) -> Message:
    """The release's own metadata (PKG-INFO); empty when there is none."""
    try:
        text = (root / "PKG-INFO").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return message_from_string(text)


def licence(root: Path) -> str:
    """The licence that the metadata names, in a word or two; "unknown" if it names none."""
    facts = metadata(root)
    named = facts.get("License-Expression")
    if not named:
        classes = [c for c in facts.get_all("Classifier", []) if c.startswith("License ::")]
        if classes:
            named = classes[-1].rpartition(" :: ")[2]
            named = _OSI.get(named, named)
    named = (named or str(facts.get("License", ""))).strip().partition("\n")[0].strip()
    return named[:60] if named and named != "UNKNOWN" else "unknown"


def _modules(home: Path) -> list[Path]:
    """Packages and single modules of a folder, but for tests and for what builds or documents."""
    if not home.is_dir():
        return []
    return [
        entry
        for entry in sorted(home.iterdir())
        if entry.stem.isidentifier()
        and entry.stem not in _NO_SOURCE
        and not _TEST_FILE.fullmatch(entry.stem)
        and entry.name not in _TEST_FOLDERS
        and ((entry / "__init__.py").is_file() or (entry.suffix == ".py" and entry.is_file()))
    ]


def _has_tests(folder: Path) -> bool:
    return any(_TEST_FILE.fullmatch(file.stem) for file in folder.rglob("*.py"))
