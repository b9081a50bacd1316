"""Writing files whose half-written state could be mistaken for whole."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import InputError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds all of it or what it held before.

    A temporary file beside it is written, flushed to disk and renamed over `path`; missing parent
    folders are made. After a crash at most a hidden `.NAME.PID.tmp` is left, never a torn `path`.
    """
    with _replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a whole file of records, one line each, atomically as `write_atomic` does."""
    with _replacing(path) as file:
        for record in records:
            file.write(_line(record))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one record as one line. One writer a file; a torn last line is cut off first."""
    line = _line(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        whole = _whole_bytes(file)
        if whole < file.seek(0, os.SEEK_END):
            file.truncate(whole)
        file.write(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a JSON-lines file, in order; a torn last line is left out.

    Raises InputError, naming file and line, if a whole line is not a JSON object or if the file
    cannot be read.
    """
    return list(iter_jsonl(path))


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """As `read_jsonl`, one record at a time, for files larger than memory should hold."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                yield read_record(line, path, number)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The record on one line; InputError names file and line if it is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: not a JSON object: {line[:80]!r}")
    return record


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    # a lone surrogate (an undecodable byte from some process) must not lose the record
    return text.encode("utf-8", "backslashreplace") + b"\n"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # without this, a power cut may undo the rename
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _whole_bytes(file: BinaryIO) -> int:
    """Length of `file` up to and with its last newline: what lies behind it was torn off."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
