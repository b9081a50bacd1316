"""A folder that is whole or not there: written aside, sealed by a manifest, moved into place.

``manifest.json`` holds the size and sha256 of every file. In an object store, which cannot rename,
the manifest alone says that a folder is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from model.hosts import barrier, host_count, host_index

MANIFEST, FORMAT = "manifest.json", "remend-hf-1"


class ExportFolder:
    """A folder that appears whole or not at all; in an object store, with its manifest or not.

    ``resume`` names what is written: files of a write of the same name that was cut off are kept.
    Each host writes files of its own and notes them in ``progress-<host>.json``; the first host
    gathers the notes into the manifest.
    """

    def __init__(self, folder: Path | str, resume: str | None) -> None:
        from etils import epath

        self._remote = "://" in str(folder)
        self._folder: Any = epath.Path(folder) if self._remote else Path(folder).absolute()
        self._resume = resume
        self._files: dict[str, dict[str, Any]] = {}
        try:
            there = self._folder.exists() and any(self._folder.iterdir())
        except ImportError as error:  # the store's driver: gcsfs, s3fs, ...
            raise InputError(f"{folder}: {error}") from None
        if there:
            if not (self._folder / MANIFEST).is_file() and not self._remote:
                raise InputError(f"{folder} exists and is not an earlier export; choose another")
        self._aside = self._folder
        if not self._remote:
            alone = host_count() == 1  # hosts must agree on the name
            mark = f"writing-{os.getpid()}" if alone and not resume else "partial"
            self._aside = self._folder.parent / f".{self._folder.name}.{mark}"

    def __enter__(self) -> ExportFolder:
        if host_index() == 0:
            kept = self._noted() if self._resume else {}
            if not kept and not self._remote:
                shutil.rmtree(self._aside, ignore_errors=True)
            if self._remote and (self._aside / MANIFEST).is_file():
                (self._aside / MANIFEST).unlink()  # what follows is not whole
            self._aside.mkdir(parents=True, exist_ok=True)
            if not kept:
                for note in self._notes():
                    note.unlink()
        barrier(f"{self._folder} opened")
        self._files = self._noted()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if host_index() == 0 and not self._remote and (kind is None or not self._resume):
            shutil.rmtree(self._aside, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether a file was finished by the write that is taken up."""
        return name in self._files

    def put(self, name: str, write_to: Callable[[Path], str]) -> None:
        """Write one file; ``write_to`` returns its sha256."""
        digest = write_to(self._aside / name)
        self._files[name] = {"bytes": self._size(name), "sha256": digest}
        note = self._aside / f"progress-{host_index()}.json"
        text = json.dumps({"resume": self._resume, "files": self._files})
        if self._remote:
            note.write_text(text)  # an object appears whole
        else:
            write_atomic(note, text)

    def put_text(self, name: str, text: str | bytes) -> None:
        """Write one small file."""
        data = text.encode() if isinstance(text, str) else text
        with (self._aside / name).open("wb") as file:
            file.write(data)
            if not self._remote:
                file.flush()
                os.fsync(file.fileno())
        self._files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def put_folder(self, save: Callable[[Path], None]) -> None:
        """Write what ``save`` puts into a local folder."""
        with tempfile.TemporaryDirectory() as scratch:
            save(Path(scratch))
            for file in sorted(Path(scratch).iterdir()):
                self.put_text(file.name, file.read_bytes())

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write the manifest and move the folder into place."""
        files = dict(sorted((self._noted() | self._files).items()))
        for note in self._notes():
            note.unlink()
        manifest = {"format": FORMAT, "meta": dict(meta), "files": files}
        self.put_text(MANIFEST, json.dumps(manifest, indent=1))
        if self._remote:
            return
        if self._folder.exists():
            old = self._folder.parent / f".{self._folder.name}.old-{os.getpid()}"
            self._folder.rename(old)
            self._aside.rename(self._folder)
            shutil.rmtree(old)
        else:
            self._aside.rename(self._folder)

    def _notes(self) -> list[Any]:
        if not self._aside.exists():
            return []
        names = sorted(path.name for path in self._aside.iterdir())
        return [self._aside / n for n in names if re.fullmatch(r"progress-\d+\.json", n)]

    def _noted(self) -> dict[str, dict[str, Any]]:
        """The files that the hosts of this write, or of the one that it takes up, have finished."""
        found: dict[str, dict[str, Any]] = {}
        for note in self._notes():
            state = json.loads(note.read_text())
            if state["resume"] == self._resume:
                found |= state["files"]
        return found

    def _size(self, name: str) -> int:
        stat: Any = (self._aside / name).stat()
        return stat.length if self._remote else stat.st_size


def check_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, after comparing size and sha256 of every file it names; None if there is none.

    Raises InputError naming the first file that is missing or differs.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        return None  # another program's manifest
    for name, fact in manifest["files"].items():
        file = path.parent / name
        if not file.is_file():
            raise InputError(f"{file} is missing; the manifest lists it")
        if file.stat().st_size != fact["bytes"]:
            raise InputError(
                f"{file} has {file.stat().st_size} bytes, its manifest says {fact['bytes']}: "
                "truncated or overwritten"
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_sha256, [path.parent / name for name in manifest["files"]])
        for (name, fact), digest in zip(manifest["files"].items(), digests, strict=True):
            if digest != fact["sha256"]:
                raise InputError(
                    f"{path.parent / name} does not match the sha256 in its manifest: corrupt"
                )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; InputError if it is missing or holds anything else."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return found
