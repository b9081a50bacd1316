"""The files of a task directory: read strictly, task.toml written."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from configs.errors import InputError

SCHEMA_VERSION = "1.4"
ORIGINS = ("sdist", "carried", "image")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")

_TASK_TOML = """\
schema_version = "{schema}"

[task]
name = "remend/{name}"
description = "Repair a bug in {package}"

[metadata.remend]
{facts}

[verifier]
timeout_sec = {verifier_s}

[agent]
timeout_sec = {agent_s}

[environment]
network_mode = "no-network"
build_timeout_sec = 600.0
cpus = 1
memory_mb = {memory_mb}
storage_mb = {storage_mb}
"""


# what Harbor gives a task: one of ours, and a repository with its whole environment
_SMALL = {"verifier_s": 360.0, "agent_s": 600.0, "memory_mb": 1024, "storage_mb": 2048}
_LARGE = {"verifier_s": 1800.0, "agent_s": 1800.0, "memory_mb": 8192, "storage_mb": 20480}


def task_toml(
    name: str, package: str, facts: Mapping[str, str | Sequence[str]], large: bool = False
) -> str:
    """Harbor's settings with ours."""
    told = {"schema": SCHEMA_VERSION, "name": name, "package": package, "facts": facts_toml(facts)}
    return _TASK_TOML.format(**told, **(_LARGE if large else _SMALL))


def facts_toml(facts: Mapping[str, str | Sequence[str]]) -> str:
    """The lines of a section of TOML."""
    return "\n".join(f"{key} = {_toml_value(value)}" for key, value in facts.items())


def checked(cls: type[Any], values: dict[str, Any], where: Path) -> dict[str, Any]:
    """What a task's file says, as the fields of `cls`. Raises InputError if it is wrong."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        default = None if field.default is MISSING else field.default
        value = values.get(field.name, list(default) if default == () else default)
        if field.type == "str":
            good = isinstance(value, str) and (bool(value) or default == "")
        elif field.type == "Path":
            good = isinstance(value, Path)
        else:
            listed = value if isinstance(value, list) else [None]
            good = all(isinstance(item, str) and item for item in listed)
            value = tuple(listed)
        if not good:
            raise InputError(f"{where}: {field.name} is missing or of the wrong kind: {value!r}")
        found[field.name] = value
    if set(values) - set(found):
        raise InputError(f"{where}: unknown keys {sorted(set(values) - set(found))}")
    if not NAME.fullmatch(found["name"]):
        raise InputError(f"{where}: {found['name']!r} is not a task name")
    for key in ("package", "version"):  # they name files in the cache
        if not NAME.fullmatch(found[key]):
            raise InputError(f"{where}: {found[key]!r} is not a {key}")
    if found["origin"] not in ORIGINS:
        raise InputError(f"{where}: origin must be one of {', '.join(ORIGINS)}")
    if (found["origin"] == "image") != ("image" in found):
        raise InputError(f'{where}: origin = "image" goes with the name of an image')
    if found["origin"] == "image":  # nothing of it is run here
        return found
    if not re.fullmatch("[0-9a-f]{64}", found["sdist_sha256"]):
        raise InputError(f"{where}: sdist_sha256 is not a SHA-256")
    if any(fnmatchcase(found["module"], pattern) for pattern in found["protected"]):
        raise InputError(f"{where}: the module under repair, {found['module']}, is protected")
    if not found["fail_to_pass"]:
        raise InputError(f"{where}: a task needs at least one failing test")
    for path in (found["module"], *found["python_path"]):
        if path.startswith("/") or ".." in path.split("/"):
            raise InputError(f"{where}: {path!r} leads out of the tree")
    return found


def _toml_value(value: str | Sequence[str]) -> str:
    # JSON strings and arrays are TOML too, but for DEL, which needs an escape there
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a task directory, or a damaged one: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path).replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object")
    return value
