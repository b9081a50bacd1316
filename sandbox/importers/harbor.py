"""Any Harbor task directory: ours as it is, others' with our facts added to its task.toml.

Whether a foreign task can be solved is told by a script that runs in its image, so that is where it
must run.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from sandbox.image_task import copy_plain, instruction_of
from sandbox.importers.rows import slug
from sandbox.task import Task
from sandbox.task_file import facts_toml

FORMAT = "harbor"
SPLIT = "heldout"
_TESTS = ("test.sh", "test.bat")
_BUILDS = ("Dockerfile", "docker-compose.yaml", "docker-compose.yml", "singularity-compose.yaml")


def task_folders(source: Path) -> list[Path]:
    """The task directory itself, or those below a folder of them, at any depth."""
    if (source / "task.toml").is_file():
        return [source]
    found = {file.parent for file in source.rglob("task.toml")}
    # a task may carry another as one of its files
    return sorted(folder for folder in found if found.isdisjoint(folder.parents))


def write_harbor(folder: Path, target: Path, split: str) -> None:
    """Copy a task directory to `target`, with our facts.

    Raises InputError when it is not one that Harbor would run.
    """
    config = _config(folder)
    if isinstance(config.get("metadata"), dict) and "remend" in config["metadata"]:
        Task.load(folder)
        copy_plain(folder, target)
        return
    facts = _facts(folder, config, split)
    copy_plain(folder, target)
    text = (folder / "task.toml").read_text(encoding="utf-8")
    text = f"{text.rstrip()}\n\n[metadata.remend]\n{facts_toml(facts)}\n"
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"task.toml takes no [metadata.remend]: {error}") from None
    write_atomic(target / "task.toml", text)


def name_of(folder: Path) -> str:
    """The name that the task has in its own settings, else its folder's."""
    task = _config(folder).get("task")
    named = task.get("name") if isinstance(task, dict) else None
    return slug(str(named).rpartition("/")[2] if named else folder.name)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "task.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"task.toml: {error}") from None


def _facts(folder: Path, config: dict[str, Any], split: str) -> dict[str, str | Sequence[str]]:
    instruction_of(folder)
    rooms = [folder, *folder.glob("steps/*/")]
    if not any((room / "tests" / name).is_file() for room in rooms for name in _TESTS):
        raise InputError("tests/test.sh is missing")
    environment = config.get("environment")
    image = environment.get("docker_image") if isinstance(environment, dict) else None
    if not isinstance(image, str) or not image:
        built = [
            f"environment/{name}" for name in _BUILDS if (folder / "environment" / name).is_file()
        ]
        if not built:
            raise InputError("neither environment.docker_image nor environment/Dockerfile is there")
        image = built[0]
    task = config.get("task")
    named = str(task.get("name", "")) if isinstance(task, dict) else ""
    if isinstance(task, dict) and not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        raise InputError(f"task.name must be ORGANISATION/NAME, not {named!r}")
    origin = slug(named.rpartition("/")[0]) or "harbor"
    licence = task.get("license") if isinstance(task, dict) else None
    return {
        "name": name_of(folder),
        "source": "imported",
        "split": split,
        "package": origin,
        "version": "unknown",
        "licence": licence if isinstance(licence, str) and licence else "unknown",
        "module": "unknown",
        "function": "unknown",
        "operator": "unknown",
        "fail_to_pass": (),
        "pass_to_pass": (),
        "python_path": (),
        "protected": (),
        "origin": "image",
        "image": image,
        "provenance": (f"format={FORMAT}", f"task={named or folder.name}"),
    }
