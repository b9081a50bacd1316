"""Figures that were measured once, found again by what they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from configs.paths import cache_dir
from configs.schema import from_dict
from tools.plan.figures import Figures
from tools.plan.job import Job

ROOT = Path(__file__).resolve().parents[2]

# What defines a program, and what counts it. A file too many costs a compilation, one too few a
# wrong answer.
_SOURCES = ("model/*.py", "sft/learner.py", "sft/packing.py", "rl/loss.py", "tools/plan/*.py")
_ONLY_SHOW = {"cli.py", "summary.py", "table.py", "search.py", "nearest.py", "cache.py"}


def key_of(job: Job, program: str) -> str:
    """A name that is the same for the same program, counted the same way, on the same chips."""
    said = json.dumps([asdict(job), program, versions(), _sources()], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def recall(key: str) -> Figures | None:
    """What was kept under a key; None if nothing was, or nothing that can be read."""
    path = _path(key)
    try:
        return from_dict(Figures, json.loads(path.read_text()), str(path))
    except (OSError, ValueError, InputError):
        return None


def keep(key: str, figures: Figures) -> None:
    """Keep figures under a key."""
    write_atomic(_path(key), json.dumps(asdict(figures)))


def _path(key: str) -> Path:
    return cache_dir() / "plan" / "programs" / f"{key}.json"


def versions() -> dict[str, str]:
    """Of the packages that a program depends on."""
    found: dict[str, Any] = {}
    for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    other = os.environ.get("TPU_LIBRARY_PATH", "")  # in place of the installed one
    for about in Path(other).parent.parent.glob("libtpu-*.dist-info") if other else ():
        found["libtpu"] = about.name.removeprefix("libtpu-").removesuffix(".dist-info")
    return found


@functools.cache
def _sources() -> str:
    """A hash of the source text that the figures depend on."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files() -> Iterable[Path]:
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.parent.name != "plan" or path.name not in _ONLY_SHOW:
                yield path
