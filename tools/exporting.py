"""`remend tasks export`: tasks as Harbor directories, or as a TFDS dataset."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.tfds_folder import free_place, write_tfds
from sandbox.image_task import ImageTask
from sandbox.task import Task, load_tasks, save_whole
from sandbox.task_index import NAMED
from tools.progress import progress

NAME, VERSION = "remend_tasks", "1.0.0"
_DESCRIPTION = (
    "Bugs in real code, each proven by tests that fail with it and pass without it. A task is a "
    "pinned source release and `bug_patch`, which puts the bug into it; `patch` is the known fix. "
    "`archive` holds the source of those that no package index has; `image` names the container "
    "image that the others' tests need."
)
_LISTS = tuple(field.name for field in fields(Task) if str(field.type).startswith("tuple"))
_TEXTS = (*(f.name for f in fields(Task) if f.type == "str"), "image", "patch", "digest")


def add_export(verbs: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser = verbs.add_parser("export", help="tasks for others: Harbor directories, or TFDS")
    names = ", ".join(NAMED)
    parser.add_argument("--to", choices=("harbor", "tfds"), required=True)
    parser.add_argument("--index", default="all", help=f"{names}, a .jsonl file, or a folder")
    parser.add_argument("--split", choices=("train", "heldout"))
    parser.add_argument("--limit", type=int, metavar="N")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    place = options.out / NAME / VERSION
    if options.to == "tfds":
        free_place(options.out, NAME, VERSION)
    with progress("tasks") as report:
        tasks = load_tasks(
            options.index, options.split, options.limit, lambda done, total: report(done, total, "")
        )
    if not tasks:
        raise InputError(f"no tasks to export in {options.index}")
    if options.to == "tfds":
        write_tasks(tasks, options.out)
    else:
        place = options.out
        for task in tasks:
            if (place / task.name).exists():
                raise InputError(f"{place / task.name} exists already: choose another --out")
        for task in tasks:
            save_whole(task, place / task.name)
    answer = {"to": options.to, "out": str(place), "tasks": len(tasks)}
    print(json.dumps(answer) if options.json else f"{len(tasks)} tasks in {place}")
    return 0


def write_tasks(tasks: Sequence[Task], folder: Path) -> Path:
    """The TFDS dataset `remend_tasks` of these tasks, one split for each of theirs."""
    present = dict.fromkeys(task.split for task in tasks)
    with progress("export") as report:
        done = 0

        def rows(split: str) -> Iterator[dict[str, Any]]:
            nonlocal done
            for task in tasks:
                if task.split == split:
                    yield _row(task)
                    done += 1
                    report(done, len(tasks), task.name)

        splits = {split: rows(split) for split in present}
        return write_tfds(folder, NAME, VERSION, _DESCRIPTION, _features, splits)


def _features(tfds: Any) -> Any:
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {name: text() for name in (*_TEXTS, "archive")}
        | {name: tfds.features.Sequence(text()) for name in _LISTS}
    )


def _row(task: Task) -> dict[str, Any]:
    image = task.image if isinstance(task, ImageTask) else ""
    made = {"image": image, "patch": task.gold_patch, "digest": task.digest}
    texts = {name: made[name] if name in made else getattr(task, name) for name in _TEXTS}
    archive = task.release.archive.read_bytes() if task.origin == "carried" else b""
    return texts | {"archive": archive} | {name: list(getattr(task, name)) for name in _LISTS}
