"""The files of a working copy: listed, read, replaced and removed, though untrusted code made them.

None of that code runs meanwhile. Every path is resolved component by component and no link is
followed; files are replaced, never opened for writing. Imports the standard library only: it works
in this process for sandboxes of this machine, and inside a container for those of another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_READ_BYTES = 4 << 20
MAX_FOUND = 200_000

Signature = tuple[int, ...]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SandboxError(ValueError):
    """Something asked of a sandbox cannot be done, through the asker's own fault: a path that leads
    out of the tree, a file that is not there or is no regular file, a file too large to read."""


@dataclass(frozen=True)
class Step:
    """One change to the files.

    kind:
      "file": put `data` there, with `mode` and `mtime_ns`; missing folders are made.
      "link": a symbolic link to `data`.
      "folder": a folder, made or put right.
      "unlink": no file there; a folder is refused.
      "remove": nothing there, whatever it was.
      "prune": no folder there, if it is empty.
    """

    kind: Literal["file", "link", "folder", "unlink", "remove", "prune"]
    path: str
    data: bytes | memoryview = b""
    mode: int = 0o644
    mtime_ns: int = 0


@dataclass
class Done:
    """What steps did: signatures of what was put and of folders made for it, and folders pruned."""

    put: dict[str, Signature] = field(default_factory=dict)
    made: dict[str, Signature] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)


class TreeFiles:
    """The files below `folder`, owned by `owner` (uid and gid; None: by us)."""

    def __init__(self, folder: str, owner: int | None) -> None:
        self.folder = folder
        self._owner = owner
        self._own(folder)

    def scan(self) -> dict[str, Signature]:
        """Everything below the folder, by relative path. OSError if it was made hard to walk."""
        found: dict[str, Signature] = {}
        self._own(self.folder)
        folders = [""]
        while folders:
            prefix = folders.pop()
            try:
                entries = os.scandir(f"{self.folder}/{prefix}")
            except PermissionError:  # closed by untrusted code, noticed by its parent's listing
                os.chmod(f"{self.folder}/{prefix}", 0o700)
                entries = os.scandir(f"{self.folder}/{prefix}")
            with entries:
                for entry in entries:
                    path = prefix + entry.name
                    status = entry.stat(follow_symlinks=False)
                    found[path] = signature(status)
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(path + "/")
            if len(found) > MAX_FOUND:
                raise OSError("too many files")
        return found

    def read(self, path: str) -> bytes:
        """Contents of a regular file; SandboxError for anything else."""
        *folders, name = parts(path)
        with self._open_folder(folders) as folder:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            except OSError as error:
                raise SandboxError(f"{path}: {_reason(error)}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise SandboxError(f"{path}: not a file")
            # a second name, or another owner: a link to something outside
            if status.st_nlink > 1 or status.st_uid != self._uid():
                raise SandboxError(f"{path}: not a file of this tree")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_READ_BYTES + 1)
        finally:
            os.close(fd)
        if len(data) > MAX_READ_BYTES:
            raise SandboxError(f"{path}: larger than {MAX_READ_BYTES >> 20} MiB")
        return data

    def apply(self, steps: Sequence[Step]) -> Done:
        """Take all steps, in order; SandboxError or OSError at the first that cannot be taken."""
        done = Done()
        for step in steps:
            *folders, name = parts(step.path)
            here = f"{self.folder}/{step.path}"
            if step.kind in ("file", "link"):
                with self._open_folder(folders, done) as folder:
                    self._unlink(step.path, name, folder)
                    put = self._put_file if step.kind == "file" else self._put_link
                    done.put[step.path] = put(step, name, folder)
            elif step.kind == "folder":
                with self._open_folder(folders, done) as folder:
                    done.put[step.path] = self._put_folder(name, folder)
            elif step.kind == "unlink":
                with contextlib.suppress(SandboxError), self._open_folder(folders) as folder:
                    self._unlink(step.path, name, folder)
            elif step.kind == "remove":
                if stat.S_ISDIR(os.lstat(here).st_mode):
                    shutil.rmtree(here)
                else:
                    os.unlink(here)
            else:
                with contextlib.suppress(OSError):  # still in use
                    os.rmdir(here)
                    done.pruned.append(step.path)
        return done

    def empty(self) -> None:
        """Remove everything, however it was made to resist."""
        delete(*(f"{self.folder}/{name}" for name in os.listdir(self.folder)))
        self._own(self.folder)

    def _put_file(self, step: Step, name: str, folder: int) -> Signature:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=folder)
        try:
            data = memoryview(step.data)
            while data:
                data = data[os.write(fd, data) :]
            if self._owner is not None:
                os.fchown(fd, self._owner, self._owner)
            os.fchmod(fd, step.mode)
            os.utime(fd, ns=(step.mtime_ns, step.mtime_ns))
            return signature(os.fstat(fd))
        finally:
            os.close(fd)

    def _put_link(self, step: Step, name: str, folder: int) -> Signature:
        os.symlink(bytes(step.data), name, dir_fd=folder)
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=folder, follow_symlinks=False)
        return signature(os.stat(name, dir_fd=folder, follow_symlinks=False))

    def _put_folder(self, name: str, folder: int) -> Signature:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=folder)
        fd = os.open(name, _FOLDER, dir_fd=folder)
        try:
            if self._owner is not None:
                os.fchown(fd, self._owner, self._owner)
            os.fchmod(fd, 0o755)
            return signature(os.fstat(fd))
        finally:
            os.close(fd)

    def _unlink(self, path: str, name: str, folder: int) -> None:
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            raise SandboxError(f"{path}: is a folder") from None

    @contextlib.contextmanager
    def _open_folder(self, names: list[str], making: Done | None = None) -> Iterator[int]:
        """A descriptor of a folder below ours, reached through real folders only; missing ones are
        made, and noted, if `making`."""
        fd = os.open(self.folder, _FOLDER)
        try:
            for index, part in enumerate(names):
                path = "/".join(names[: index + 1])
                try:
                    below = os.open(part, _FOLDER, dir_fd=fd)
                except FileNotFoundError:
                    if making is None:
                        raise SandboxError(f"{path}: no such folder") from None
                    os.mkdir(part, 0o755, dir_fd=fd)
                    below = os.open(part, _FOLDER, dir_fd=fd)
                    if self._owner is not None:
                        os.fchown(below, self._owner, self._owner)
                    making.made[path] = signature(os.fstat(below))
                except OSError as error:
                    raise SandboxError(f"{path}: {_reason(error)}") from None
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _own(self, folder: str) -> None:
        if self._owner is not None:
            os.lchown(folder, self._owner, self._owner)
        os.chmod(folder, 0o755)

    def _uid(self) -> int:
        return os.geteuid() if self._owner is None else self._owner


def signature(status: os.stat_result) -> Signature:
    """What changes whenever a process changes the thing: for a folder, the folder alone.

    The change time (`ctime`) is one that a process cannot set.
    """
    if stat.S_ISDIR(status.st_mode):
        return (status.st_mode, status.st_uid, status.st_ino)
    return (
        status.st_mode,
        status.st_uid,
        status.st_ino,
        status.st_nlink,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def parts(path: str) -> list[str]:
    """Components of a path that stays in the tree; SandboxError otherwise."""
    if not path or path.startswith("/") or "\0" in path or len(path) > 1000:
        raise SandboxError(f"{path[:100]!r}: give a path relative to the tree")
    names = [part for part in path.split("/") if part not in ("", ".")]
    if not names or ".." in names:
        raise SandboxError(f"{path[:100]!r}: give a path inside the tree")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise SandboxError(f"{path[:100]!r}: not a file name") from None
    return names


def _reason(error: OSError) -> str:
    kinds = {FileNotFoundError: "no such file", NotADirectoryError: "not a folder"}
    for kind, text in kinds.items():
        if isinstance(error, kind):
            return text
    return "not a file of this tree"  # a link, mostly


def delete(*paths: str | os.PathLike[str]) -> None:
    """Remove files and folders, however many they hold and however they were made to resist.

    By `rm`, which minds neither depth nor the length of paths, as Python's own would.
    """
    if not paths:
        return
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        subprocess.run(
            [*command, "--", *(os.fspath(path) for path in paths)],
            env={"PATH": os.defpath},
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if not any(map(os.path.lexists, paths)):
            return
    raise OSError(f"cannot remove {os.fspath(paths[0])}")
