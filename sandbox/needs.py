"""What a release's tests import and its metadata do not ask for: found, so that they can run."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sandbox.layout import is_test

# projects whose module has another name
_PROJECTS = {"attr": "attrs", "bs4": "beautifulsoup4", "dateutil": "python-dateutil"}
_PROJECTS |= {"dotenv": "python-dotenv", "pkg_resources": "setuptools", "yaml": "pyyaml"}
_SETTINGS = ("PKG-INFO", "pyproject.toml", "setup.py", "setup.cfg", "tox.ini", "noxfile.py")
_LISTS = (
    *("*requirements*.txt", "requirements/*.txt", "tests/requirements*.txt"),
    *("*.egg-info/requires.txt", "src/*.egg-info/requires.txt"),
)


def imported_by_tests(root: Path, tests: Iterable[str]) -> list[str]:
    """Projects that the tests of a tree import, and that the tree itself names in its settings.

    A module that is named nowhere is taken for one of the tree's own: nothing is asked of an index
    on the word of an `import` alone. Files that do not parse are left out.
    """
    tests = tuple(tests)
    modules: set[str] = set()
    own = {path.stem for path in (*root.iterdir(), *(root / "src").glob("*"))}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if is_test(path, tests):
            own.add(file.stem)
            modules |= _imports(file)
    named = _named(root)
    projects = {_PROJECTS.get(name, name).replace("_", "-") for name in modules - own}
    projects -= {name.replace("_", "-") for name in sys.stdlib_module_names}
    return sorted(name for name in projects if name in named)


def _imports(file: Path) -> set[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _named(root: Path) -> set[str]:
    """Every word of the files that say what a project needs, as projects are named."""
    files = [root / name for name in _SETTINGS]
    files += [file for pattern in _LISTS for file in root.glob(pattern)]
    words: set[str] = set()
    for file in files:
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            words |= {re.sub(r"[-_.]+", "-", w).lower() for w in re.findall(r"[\w.-]+", text)}
    return words
