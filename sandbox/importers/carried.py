"""Source trees that are on no package index: packed, so that a task directory can carry them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from configs.errors import InputError
from configs.files import write_atomic
from sandbox.packages import Release
from sandbox.unpack import MAX_FILES, MAX_TREE_BYTES, unpack_sdist

Files = Mapping[str, bytes]

_LICENCES = {
    "MIT": "Permission is hereby granted, free of charge",
    "Apache-2.0": "Apache License",
    "BSD": "Redistribution and use in source and binary forms",
    "GPL": "GNU GENERAL PUBLIC LICENSE",
}


def carry(package: str, version: str, files: Files, requirements: tuple[str, ...] = ()) -> Release:
    """These files as a release that is in the cache, unpacked. The same files, the same release.

    Its version ends in the files' digest: tasks of one commit may differ in theirs. Raises
    InputError for a tree that is too large, or a requirement that is not pinned.
    """
    total = hashlib.sha256()
    for path, data in sorted(files.items()):
        for part in (path.encode("utf-8", "surrogateescape"), data):
            total.update(len(part).to_bytes(8, "big") + part)
    version = f"{version}-{total.hexdigest()[:8]}"
    archive = _pack(files, f"{package}-{version}")
    digest = hashlib.sha256(archive).hexdigest()
    release = Release(package, version, digest, requirements=requirements, carried=True)
    if not release.tree.is_dir():
        write_atomic(release.archive, archive)
        unpack_sdist(release.archive, release.tree, release.finish)
    return release


def _pack(files: Files, top: str) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(f"{top}/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def read_folder(root: Path) -> dict[str, bytes]:
    """The plain files below a folder, by path, as git would have them: no links, nothing compiled.

    Raises InputError for a folder too large to be carried.
    """
    found: dict[str, bytes] = {}
    size = 0
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__"))
        for name in sorted(names):
            path = Path(folder, name)
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or path.suffix == ".pyc":
                continue
            size += status.st_size
            _limit(len(found) + 1, size, root)
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def read_commit(repository: Path, commit: str) -> dict[str, bytes]:
    """The plain files of one commit of a local git repository, whatever is checked out.

    Object by object, so that no attribute or filter of the repository changes or leaves out any.
    Raises InputError when there is no such commit.
    """
    if not re.fullmatch("[0-9a-f]{7,40}", commit):
        raise InputError(f"{commit!r} is not a commit")
    listed = _git(repository, "ls-tree", "-r", "-z", "-l", "--full-tree", commit).split(b"\0")
    blobs = [line.split(None, 4) for line in listed if line]
    plain = [b for b in blobs if b[0] in (b"100644", b"100755") and not b[4].endswith(b".pyc")]
    _limit(len(plain), sum(int(b[3]) for b in plain), repository)
    wanted = b"".join(b[2] + b"\n" for b in plain)
    told = _git(repository, "cat-file", "--batch", given=wanted)
    paths = [b[4].decode("utf-8", "surrogateescape") for b in plain]
    return dict(zip(paths, _objects(told), strict=True))


def _objects(told: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(told):
        end = told.index(b"\n", at)
        size = int(told[at:end].split()[2])
        yield told[end + 1 : end + 1 + size]
        at = end + size + 2


def head(repository: Path) -> str:
    """The commit that is checked out."""
    return _git(repository, "rev-parse", "HEAD").decode().strip()


def is_repository(folder: Path) -> bool:
    """Whether a folder is the root of a git repository, bare or not."""
    return (folder / ".git").exists() or (
        (folder / "objects").is_dir() and (folder / "HEAD").exists()
    )


def _git(repository: Path, *arguments: str, given: bytes = b"") -> bytes:
    command = ["git", "-c", f"safe.directory={repository.resolve()}", "-C", str(repository)]
    try:
        ended = subprocess.run(
            [*command, *arguments], input=given, capture_output=True, check=False
        )
    except OSError as error:
        raise InputError(f"cannot run git, to read {repository}: {error}") from None
    if ended.returncode != 0:
        told = ended.stderr.decode("utf-8", "replace").strip().splitlines()
        raise InputError(f"{repository}: git {arguments[0]}: {told[-1] if told else 'failed'}")
    return ended.stdout


def _limit(count: int, size: int, where: Path) -> None:
    if count > MAX_FILES or size > MAX_TREE_BYTES:
        raise InputError(f"{where}: more than {MAX_FILES} files or {MAX_TREE_BYTES} bytes")


def licence_of(files: Files) -> str:
    """The licence whose words stand in the tree's licence file; "unknown" if none is known."""
    for path in sorted(files):
        if re.match(r"(licen[cs]e|copying)", PurePosixPath(path).name, re.I) and "/" not in path:
            text = files[path].decode("utf-8", "replace")
            for name, words in _LICENCES.items():
                if words in text:
                    return name
    return "unknown"
