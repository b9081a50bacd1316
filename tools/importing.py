"""`remend tasks import`: tasks of other projects as task directories."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from configs.errors import InputError
from configs.files import read_record
from sandbox.importers import harbor, quixbugs, r2e, swe_bench, swe_smith
from sandbox.importers.carried import is_repository
from sandbox.importers.for_image import write_for_image
from sandbox.importers.rows import Issue, slug, with_tree
from sandbox.local import LocalPool
from sandbox.task import Task
from sandbox.wheels import have_wheels
from tools.progress import progress

ROWS = {module.FORMAT: module for module in (swe_bench, swe_smith, r2e)}
FORMATS = (*ROWS, quixbugs.FORMAT, harbor.FORMAT)


def add_import(verbs: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser = verbs.add_parser("import", help="other projects' tasks as task directories")
    parser.add_argument("source", type=Path, help="a .jsonl file of rows, or a folder")
    parser.add_argument("--format", choices=FORMATS, help="default: what SOURCE looks like")
    parser.add_argument("--out", type=Path, required=True, help="folder for the directories")
    parser.add_argument(
        "--repo-dir",
        type=Path,
        metavar="DIR",
        help="the rows' repository, or a folder of repositories named OWNER__NAME or NAME: "
        "their tasks then run here, without a container image",
    )
    parser.add_argument(
        "--requirements",
        type=Path,
        metavar="FILE",
        help="wheels that the repository's tests need: NAME==VERSION --hash=sha256:HEX a line",
    )
    parser.add_argument("--split", choices=("train", "heldout"), help="default: by format")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N tasks")
    parser.set_defaults(run=_run)
    return parser


@dataclass
class _Done:
    """What became of each row or folder."""

    out: Path
    imported: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, where: str, name: str, write: Callable[[Path], None]) -> None:
        """Have a task directory written aside and put in its place whole, or not at all."""
        target = self.out / name
        self.out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name[:40]}.", dir=self.out))
        try:
            aside.chmod(0o755)
            write(aside)
            made = Task.load(aside).digest
            if name in (*self.imported, *self.there):
                raise InputError(f"a second task of the name {name}")
            if not target.exists():
                aside.rename(target)
                self.imported.append(name)
            elif Task.load(target).digest == made:
                self.there.append(name)
            else:
                raise InputError(f"{target} exists already, and is another task")
        except InputError as error:
            self.refuse(where, str(error).replace(f"{aside}/", ""))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def refuse(self, where: str, reason: str) -> None:
        self.refused[where] = reason
        print(f"{where}: refused: {reason}", file=sys.stderr)

    def count(self) -> int:
        return len(self.imported) + len(self.there)


def _run(options: argparse.Namespace) -> int:
    if not options.source.exists():
        raise InputError(f"{options.source}: no such file or folder")
    done = _Done(options.out)
    format = options.format or _format_of(options.source)
    if format in ROWS:
        _rows(options, ROWS[format], done)
    elif format == quixbugs.FORMAT:
        asyncio.run(_quixbugs(options, done))
    else:
        _harbor(options, done)
    answer = {
        "format": format,
        "out": str(options.out),
        "imported": len(done.imported),
        "there_already": len(done.there),
        "refused": done.refused,
        "tasks": [*done.there, *done.imported],
    }
    there = f", {len(done.there)} there already" if done.there else ""
    refused = f", {len(done.refused)} refused" if done.refused else ""
    told = f"{len(done.imported)} tasks of {format} in {options.out}{there}{refused}"
    print(json.dumps(answer) if options.json else told)
    if not done.count():
        raise InputError(f"{options.source}: none of it could be imported")
    return 1 if done.refused else 0


def _format_of(source: Path) -> str:
    """The format that a source is unmistakably of. Raises InputError when it could be another."""
    if source.is_dir():
        if quixbugs.recognizes(source):
            return quixbugs.FORMAT
        if harbor.task_folders(source):
            return harbor.FORMAT
    else:
        for _, line in _lines(source):
            try:
                record = read_record(line, source, 1)
            except InputError:
                continue
            known = [name for name, module in ROWS.items() if module.recognizes(record)]
            if len(known) == 1:
                return known[0]
            break
    raise InputError(f"{source}: of which format is it? Say --format {{{','.join(FORMATS)}}}")


# -- rows


def _rows(options: argparse.Namespace, module: ModuleType, done: _Done) -> None:
    split = options.split or module.SPLIT
    requirements = _requirements(options.requirements)
    if options.repo_dir is not None and not options.repo_dir.is_dir():
        raise InputError(f"{options.repo_dir}: no such folder")
    if options.source.is_dir():
        raise InputError(f"{options.source} is a folder: {module.FORMAT} wants a .jsonl file")
    lines = list(_lines(options.source))
    with progress("import") as report:
        for count, (number, line) in enumerate(lines, start=1):
            if options.limit is not None and done.count() >= options.limit:
                break
            where = f"{options.source}:{number}"
            try:
                issue = module.read(read_record(line, options.source, number))
                checkout = _checkout(options.repo_dir, issue)
                if checkout is None:
                    done.put(where, issue.name, _image_writer(issue, split))
                else:
                    task = with_tree(issue, checkout, split, requirements)
                    done.put(where, issue.name, task.save)
            except InputError as error:
                done.refuse(where, str(error).removeprefix(f"{where}: "))
            except UnicodeError:
                done.refuse(where, "holds text that UTF-8 cannot carry")
            report(count, len(lines), "")


def _image_writer(issue: Issue, split: str) -> Callable[[Path], None]:
    return lambda folder: write_for_image(issue, folder, split)


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their numbers; the last may lack its end."""
    try:
        with open(source, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None


def _checkout(folder: Path | None, issue: Issue) -> Path | None:
    """Where the row's repository lies; None where only its image is to be had."""
    if folder is None:
        return None
    own = {issue.package, slug(issue.repo.rpartition("/")[2])}
    if is_repository(folder):
        return folder
    below = {path.name: path for path in folder.iterdir() if path.is_dir() and path.name in own}
    if below:
        return below.get(issue.package) or below[min(below)]
    if any(is_repository(path) for path in folder.iterdir()):
        raise InputError(f"{folder}: holds no {issue.package}")
    return folder


def _requirements(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    pins = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    have_wheels(pins)
    return pins


# -- folders


async def _quixbugs(options: argparse.Namespace, done: _Done) -> None:
    source = quixbugs.QuixBugs(options.source)
    total = len(source.programs)
    async with LocalPool(1, backend=options.backend) as pool:
        with progress("import") as report:
            made = source.tasks(pool, options.split or quixbugs.SPLIT)
            async for name, task in made:
                if isinstance(task, Task):
                    done.put(name, task.name, task.save)
                else:
                    done.refuse(name, task)
                report(len(done.refused) + done.count(), total, name)
                if options.limit is not None and done.count() >= options.limit:
                    break


def _harbor(options: argparse.Namespace, done: _Done) -> None:
    folders = harbor.task_folders(options.source)
    if not folders:
        raise InputError(f"{options.source}: no task.toml in it, so no Harbor task directory")
    split = options.split or harbor.SPLIT
    for folder in folders:
        if options.limit is not None and done.count() >= options.limit:
            break
        try:
            name = harbor.name_of(folder)
            done.put(str(folder), name, _harbor_writer(folder, split))
        except InputError as error:
            done.refuse(str(folder), str(error))


def _harbor_writer(folder: Path, split: str) -> Callable[[Path], None]:
    return lambda target: harbor.write_harbor(folder, target, split)
