"""Unpacking a source archive that is not trusted, into a tree that never changes."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from configs.errors import InputError

MAX_TREE_BYTES = 256 << 20
MAX_FILES = 20_000
# one date for every file: compiled files stay valid wherever the tree is made
MTIME = 1_577_836_800


def unpack_sdist(
    archive: Path, target: Path, finish: Callable[[Path], None] = lambda root: None
) -> None:
    """Unpack an sdist (`.tar.gz` with one top folder) as the folder `target`, top folder stripped.

    The folder appears whole or not at all; `finish` is called on it before it does. Raises
    InputError for an archive that is damaged, too large, or holds anything but plain files and
    folders below its top folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                _extract(tar, aside, archive.name)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"{archive}: not a readable sdist: {error}") from error
        for path in [aside, *aside.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            os.utime(path, (MTIME, MTIME))
        finish(aside)
        try:
            os.rename(aside, target)
        except OSError:
            if not target.is_dir():
                raise
            # another process was faster: its tree is the same
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _extract(tar: tarfile.TarFile, folder: Path, name: str) -> None:
    members = tar.getmembers()
    if len(members) > MAX_FILES or sum(m.size for m in members) > MAX_TREE_BYTES:
        raise InputError(
            f"{name}: unpacks to more than {MAX_FILES} files or {MAX_TREE_BYTES} bytes"
        )
    tops = {member.name.split("/")[0] for member in members}
    if len(tops) != 1 or tops & {"", ".", ".."}:
        raise InputError(f"{name}: an sdist has one top folder, this has {sorted(tops)}")
    for member in members:
        parts = member.name.split("/")
        plain = member.isfile() or member.isdir()
        if not plain or ".." in parts or "\\" in member.name:
            raise InputError(f"{name}: holds {member.name!r}, which is no plain file inside it")
        path = folder.joinpath(*(part for part in parts[1:] if part))
        if member.isdir():
            if "__pycache__" not in parts:
                path.mkdir(parents=True, exist_ok=True)
        elif path != folder and "__pycache__" not in parts and path.suffix != ".pyc":
            # not `extract`: there are no links to follow here, and its filters came with 3.11.4
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # of a plain file
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
