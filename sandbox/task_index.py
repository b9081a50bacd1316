"""Task indexes: files of facts, one line a task, from which tasks are made on first use.

Three have names: "shipped" (procedural bugs), "releases" (real ones, mined from adjacent releases)
and "all" (both). Any other is a `.jsonl` file, whose lines may be of either kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from configs.errors import InputError
from configs.files import iter_jsonl
from sandbox.mined import RELEASES, Mined, build_mined
from sandbox.packages import Release
from sandbox.shipped import SHIPPED, Made, Row, build, row_from
from sandbox.task import INDEX_NAMES, Task

NAMED = dict(zip(INDEX_NAMES, ((SHIPPED,), (RELEASES,), (SHIPPED, RELEASES)), strict=True))

Line = Row | Mined


def files_of(index: Path | str) -> tuple[Path, ...]:
    """The files of an index. Raises InputError when there is no such file."""
    files = NAMED.get(str(index), (Path(index),))
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such task index (names: {', '.join(NAMED)})")
    return files


def read_index(index: Path | str) -> list[Line]:
    """All lines of an index. Raises InputError, naming file and line, for a damaged one."""
    lines: list[Line] = []
    for path in files_of(index):
        for number, record in enumerate(iter_jsonl(path), start=1):
            where = f"{path}:{number}"
            if record.get("source") == "release":
                lines.append(row_from(Mined, record, where))
            elif record.get("source") == "procedural":
                lines.append(row_from(Made, record, where))
            else:
                lines.append(row_from(Row, record, where))
    return lines


def releases_of(lines: Iterable[Line]) -> list[Release]:
    """What must be in the cache before these lines' tasks can be made."""
    found: dict[Release, None] = {}
    for line in lines:
        if isinstance(line, Mined):
            found.update(dict.fromkeys(line.releases))
        elif line.release is not None:
            found[line.release] = None
    return list(found)


def make(line: Line) -> Task:
    """The task of one line. Raises InputError when the line does not fit its releases."""
    return build_mined(line) if isinstance(line, Mined) else build(line)


def source_of(line: Line) -> str:
    """What the tasks of a line name as their source."""
    return line.source if isinstance(line, Mined) else "procedural"


def in_build_order(lines: Sequence[Line]) -> list[Line]:
    """One module's tasks after another: it is read and parsed once."""
    return sorted(lines, key=lambda line: (line.package, line.version, line.module, line.function))
