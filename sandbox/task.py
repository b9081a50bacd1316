"""A repair task: a Harbor task directory, and the same thing in memory.

    NAME/
      task.toml          Harbor's settings; our facts under [metadata.remend]
      instruction.md     what the agent is told
      environment/       Dockerfile, requirements.txt, the pinned sdist, bug.patch
      tests/             test.sh, judge.py, tests.json, the sdist (for the pristine tests)
      solution/          solve.sh, gold.patch

The sdist is a hard link into the cache where the file system allows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from configs.errors import InputError
from configs.paths import cache_dir
from sandbox.base import Tree
from sandbox.packages import INDEX, Release, adopt, fetch, load_packages
from sandbox.patch import apply_patch, make_patch
from sandbox.task_file import checked, read_json, read_text, read_toml, task_toml
from sandbox.wheels import FOLDER as REQUIREMENTS

T = TypeVar("T")

INDEX_NAMES = ("shipped", "releases", "all")
_TEMPLATES = INDEX / "harbor"

# `*` matches `/` too (fnmatch). Whatever decides which tests run, or how, is no place for a fix.
ALWAYS_PROTECTED = (
    *("tests/*", "*/tests/*", "test/*", "*/test/*"),
    *("conftest.py", "*/conftest.py", "pytest.ini", "*/pytest.ini", ".pytest.ini"),
    *("setup.cfg", "tox.ini", "pyproject.toml", "*.pth", "*.pyc", "*.pyd", "*.so"),
    *("sitecustomize.py", "*/sitecustomize.py", "usercustomize.py", "*/usercustomize.py"),
    *("__pycache__/*", "*/__pycache__/*", "*.egg-info/*", "*.dist-info/*", ".git/*"),
    f"{REQUIREMENTS}/*",
)


@dataclass(frozen=True)
class Task:
    """One bug in one pinned release, with the tests that tell.

    Attributes:
      module: the file that holds the bug, relative to the tree.
      function: qualified name of the function that holds it.
      operator: the mutation operator that made it.
      fail_to_pass: pytest ids, relative to the tree, that fail before and pass after the fix.
      pass_to_pass: pytest ids that pass before and after.
      python_path: folders, relative to the tree, that tests find first on `sys.path`.
      bug_patch: unified diff from the pristine release to the buggy one.
      protected: patterns (fnmatch, `*` matches `/`) of paths that a fix may not touch.
      requirements: wheels that the tests need, `name==version --hash=sha256:…` each.
      origin: "sdist", a release of a package index; "carried", an archive that is nowhere but in
        the task directory (an imported task's); "image" (`sandbox.image_task`), a container image.
      provenance: where an imported task comes from, `key=value` each.
    """

    name: str
    source: str
    split: str
    package: str
    version: str
    sdist_sha256: str
    licence: str
    module: str
    function: str
    operator: str
    instruction: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    python_path: tuple[str, ...]
    bug_patch: str
    protected: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    origin: str = "sdist"
    provenance: tuple[str, ...] = ()

    @property
    def release(self) -> Release:
        """The pinned release that the bug was put into."""
        release = Release(
            self.package,
            self.version,
            self.sdist_sha256,
            requirements=self.requirements,
            carried=self.origin == "carried",
        )
        known = load_packages().get(self.package)
        same = known is not None and (known.version, known.sha256, known.requirements) == (
            self.version,
            self.sdist_sha256,
            self.requirements,
        )
        return known if known is not None and same else release

    @cached_property
    def _buggy(self) -> dict[str, bytes | None]:
        return apply_patch(self._pristine, self.bug_patch)

    def _pristine(self, path: str) -> bytes | None:
        file = self.release.tree / path
        return file.read_bytes() if file.is_file() else None

    def files(self) -> dict[str, bytes | None]:
        """The buggy files: what lies over the pristine tree; None where a file is missing.

        Raises InputError when the bug does not fit the release.
        """
        return dict(self._buggy)

    def tree(self) -> Tree:
        """The buggy tree, ready to be leased; the release is fetched if it is not there."""
        fetch([self.release])
        return Tree(self.release.tree, self.files(), self.python_path)

    @cached_property
    def gold_patch(self) -> str:
        """The way back: for the oracle control only, never for an agent or a teacher."""
        buggy = self.files()
        return make_patch(_present(buggy), _present({p: self._pristine(p) for p in buggy}))

    @property
    def digest(self) -> str:
        """SHA-256 over the task directory: every text in it, by name, and the sdist's SHA-256."""
        total = hashlib.sha256(self.sdist_sha256.encode())
        for name, text in sorted(self._texts().items()):
            for part in (name.encode(), text.encode("utf-8", "surrogatepass")):
                total.update(len(part).to_bytes(8, "big") + part)
        return total.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the task directory. Write it aside and rename when a half one would do harm."""
        for room in ("environment", "tests", "solution"):
            (folder / room).mkdir(parents=True, exist_ok=True)
        for name, text in self._texts().items():
            with open(folder / name, "w", encoding="utf-8", newline="") as file:
                file.write(text)
        for name in ("tests/test.sh", "solution/solve.sh"):
            (folder / name).chmod(0o755)
        for room in ("environment", "tests"):
            _link(self.release.archive, folder / room / self.release.archive.name)

    def _texts(self) -> dict[str, str]:
        """The text files of the task directory, by path."""
        archive = self.release.archive.name
        tests = {
            "archive": archive,
            "sha256": self.sdist_sha256,
            "python_path": self.python_path,
            "protected": self.protected,
            "fail_to_pass": self.fail_to_pass,
            "pass_to_pass": self.pass_to_pass,
        }
        path = ":".join(os.path.normpath(f"/app/{entry}") for entry in self.python_path)
        dockerfile = Template(_template("Dockerfile")).substitute(archive=archive, python_path=path)
        return {
            "task.toml": self._toml(),
            "instruction.md": self.instruction + "\n",
            "environment/Dockerfile": dockerfile,
            "environment/requirements.txt": _template("requirements.txt")
            + "".join(f"{line}\n" for line in self.requirements),
            "environment/bug.patch": self.bug_patch,
            "tests/test.sh": _template("test.sh"),
            "tests/judge.py": _template("judge.py"),
            "tests/tests.json": json.dumps(tests, ensure_ascii=False, indent=1) + "\n",
            "solution/solve.sh": _template("solve.sh"),
            "solution/gold.patch": self.gold_patch,
        }

    def _toml(self) -> str:
        facts = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _ELSEWHERE
            # later additions: left out where they say nothing, or old tasks would get new digests
            and not (field.name in _OPTIONAL and getattr(self, field.name) == field.default)
        }
        return task_toml(self.name, self.package, facts)

    @classmethod
    def load(cls, folder: Path) -> Task:
        """Read a task directory.

        Raises InputError, naming the file, when one is missing or says something impossible.
        """
        config = read_toml(folder / "task.toml")
        metadata = config.get("metadata")
        facts = metadata.get("remend") if isinstance(metadata, dict) else None
        if not isinstance(facts, dict):
            raise InputError(
                f"{folder / 'task.toml'}: no [metadata.remend] section: "
                "is it to be taken in by remend tasks import?"
            )
        if "image" in facts:
            from sandbox.image_task import ImageTask

            return ImageTask.read(folder, facts)
        tests = read_json(folder / "tests" / "tests.json")
        values = {
            **facts,
            "instruction": read_text(folder / "instruction.md").strip(),
            "bug_patch": read_text(folder / "environment" / "bug.patch"),
            "fail_to_pass": tests.get("fail_to_pass"),
            "pass_to_pass": tests.get("pass_to_pass"),
        }
        task = cls(**checked(cls, values, folder / "task.toml"))
        archive = folder / "environment" / task.release.archive.name
        if not archive.is_file():
            raise InputError(f"{archive}: the task's source archive is missing")
        adopt(task.release, archive)
        return task


def load_tasks(
    index: Path | str = "shipped",
    split: str | None = None,
    limit: int | None = None,
    done: Callable[[int, int], None] = lambda done, total: None,
    packages: Collection[str] = (),
) -> list[Task]:
    """The tasks of an index, in its order, of one split or all; `limit` of them, evenly spread.

    `index` is a named index (`task_index.NAMED`), another index file (`.jsonl`), or a folder of
    task directories. `packages`: only tasks of these, if any are named. Tasks of
    an index file are made once and kept in the cache as Harbor directories. `done` is told how
    many are ready.

    Raises InputError for anything damaged, and when a release cannot be fetched.
    """
    from sandbox.task_index import files_of, in_build_order, make, read_index, releases_of

    def wanted(one: Any) -> bool:
        return split in (None, one.split) and (not packages or one.package in packages)

    path = Path(index)
    if str(index) not in INDEX_NAMES and path.is_dir():
        # what save_whole did not end writing lies in a folder with a dot
        folders = sorted(file.parent for file in path.glob("[!.]*/task.toml"))
        if not folders:
            raise InputError(f"{path}: no task directories in it")
        tasks = [Task.load(folder) for folder in folders]
        return _spread([task for task in tasks if wanted(task)], limit)
    lines = _spread([line for line in read_index(index) if wanted(line)], limit)
    home = cache_dir() / "tasks" / _stamp(files_of(index))
    missing = [line for line in lines if not (home / line.name).is_dir()]
    fetch(releases_of(missing))
    ready: dict[str, Task] = {}
    for line in in_build_order(lines):
        folder = home / line.name
        if folder.is_dir():
            ready[line.name] = Task.load(folder)
        else:
            ready[line.name] = make(line)
            save_whole(ready[line.name], folder)
        done(len(ready), len(lines))
    return [ready[line.name] for line in lines]


def _spread(items: list[T], limit: int | None) -> list[T]:
    """At most `limit` items at even distances: an index is sorted by package."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def save_whole(task: Task, folder: Path) -> None:
    """Save so that the folder is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{task.name}.", dir=folder.parent))
    try:
        task.save(aside)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():
            raise
        # another process was faster: its task is the same
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _stamp(indexes: tuple[Path, ...]) -> str:
    """Changes when the index does, or the pins, or whatever decides what task directories hold."""
    digest = hashlib.sha256()
    code = [Path(__file__).with_name(f"{name}.py") for name in _DECISIVE]
    for path in (*indexes, INDEX / "packages.toml", *code, *sorted(_TEMPLATES.iterdir())):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# the modules whose code decides what a task directory holds
_DECISIVE = ("task", "task_file", "shipped", "mined", "changelog", "hunks", "patch")
_ELSEWHERE = ("instruction", "fail_to_pass", "pass_to_pass", "bug_patch")
_OPTIONAL = ("origin", "provenance")


def _present(files: dict[str, bytes | None]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if data is not None}


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


@cache
def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
