"""A task whose tests run in a container image and nowhere else: a Harbor directory, kept as it is.

Imported ones of other projects are mostly such. They are counted, exported and published like any
other; what would have to run them here says which image they want.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from sandbox.base import Tree
from sandbox.task import Task
from sandbox.task_file import NAME, checked, read_toml


class NeedsImage(InputError):
    """A task cannot be run here, since its tests want an image."""


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """A task directory with the facts of a `Task`, less those of a source archive.

    Attributes:
      image: a container image's name, or the file of the directory that builds it.
      folder: the task directory.
    """

    image: str
    folder: Path
    sdist_sha256: str = ""
    bug_patch: str = ""

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> ImageTask:
        """From a task directory and its [metadata.remend]. Raises InputError if they are wrong."""
        values = {**facts, "instruction": instruction_of(folder), "folder": folder}
        return cls(**checked(cls, values, folder / "task.toml"))

    def files(self) -> dict[str, bytes | None]:
        raise self._refusal()

    def tree(self) -> Tree:
        raise self._refusal()

    def _refusal(self) -> NeedsImage:
        return NeedsImage(
            f"{self.name} needs the container image {self.image}, which this sandbox cannot run; "
            "run it with Harbor on a Docker host"
        )

    @property
    def gold_patch(self) -> str:
        """The known fix, where it is a patch; "" where it is a script alone."""
        file = self.folder / "solution" / "gold.patch"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    @property
    def digest(self) -> str:
        """SHA-256 over the task directory: every file in it, by name."""
        total = hashlib.sha256()
        for path in plain_files(self.folder):
            for part in (path.encode(), (self.folder / path).read_bytes()):
                total.update(len(part).to_bytes(8, "big") + part)
        return total.hexdigest()

    def save(self, folder: Path) -> None:
        copy_plain(self.folder, folder)


def instruction_of(folder: Path) -> str:
    """What the agent is told: instruction.md, or those of the task's steps one after another.

    Raises InputError, naming the file, when one is missing or empty.
    """
    told: list[str] = []
    for name in [f"steps/{step}/instruction.md" for step in _steps(folder)] or ["instruction.md"]:
        try:
            told.append((folder / name).read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"{name} cannot be read: {why}") from None
        if not told[-1]:
            raise InputError(f"{name} is empty")
    return "\n\n".join(told)


def _steps(folder: Path) -> list[str]:
    """Names of the task's steps, in their order; most have none."""
    steps = read_toml(folder / "task.toml").get("steps", [])
    if not isinstance(steps, list):
        raise InputError("task.toml: steps is no list")
    names = [str(step.get("name")) for step in steps if isinstance(step, dict)]
    if not all(NAME.fullmatch(name) for name in names):
        raise InputError("task.toml: a step's name is missing or is no folder's")
    return names


def plain_files(folder: Path) -> list[str]:
    """Paths of a directory's files. Raises InputError for links and whatever else is no file."""
    found = []
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise InputError(f"{path}: neither a file nor a folder: task directories hold both")
        found += [Path(place, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def copy_plain(source: Path, target: Path) -> None:
    """Copy a directory's files, with their permissions to be executed."""
    for path in plain_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, target / path)
