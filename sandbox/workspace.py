"""A sandbox's working copy of a tree, as the harness sees it: filled, restored, read and compared.

What lies in the folder was last touched by untrusted code, though none of it runs while the harness
looks. So every path is resolved component by component and no link is followed; files are replaced,
never opened for writing; and what changed is told by inode, size and change time (`ctime`, which a
process cannot set), so that restoring a tree costs one `lstat` a file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from sandbox.base import SandboxError, Tree
from sandbox.patch import PatchError, check_path, is_text, make_patch

MAX_READ_BYTES = 4 << 20
MAX_CHANGED = 1000
CACHES = ("__pycache__", ".pytest_cache")

# Contents put over a tree get a modification time of their own, in whole seconds because that is
# what a `.pyc` records, and of a time no archive holds: no compiled file can pass for theirs.
_times = itertools.count(4_102_444_800)  # the year 2100

Edits = dict[str, bytes | None]  # path -> contents that differ from the tree's; None: no such file
Signature = tuple[int, ...]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Workspace:
    """The folder `folder`, owned by `owner` (uid and gid; None: by us)."""

    def __init__(self, folder: Path, owner: int | None) -> None:
        self.folder = folder
        self.owner = owner
        self.root: Path | None = None
        self._lease: Edits = {}
        self._edits: Edits = {}
        self._recorded: dict[str, Signature] = {}
        self._made: set[str] = set()  # folders that are not in the tree
        folder.mkdir(mode=0o755)
        self._own(folder)

    # -- the state as a whole

    def lease(self, tree: Tree) -> None:
        """Make the folder equal to `tree`, whatever was done to it, at the least cost."""
        for path in tree.overlay:
            _parts(path)
        target = _with_stale_bytecode(tree.root, dict(tree.overlay))
        if tree.root == self.root:
            try:
                self._restore(target)
                self._lease = dict(target)
                return
            except (OSError, RecursionError):
                pass  # a tree made to be hard to walk
        self._rebuild(tree.root)
        for path in sorted(target):
            self._put(path, target[path])
        self._lease = dict(target)

    def restore(self) -> None:
        """Undo whatever processes changed since the harness last wrote."""
        assert self.root is not None
        edits = dict(self._edits)
        try:
            self._restore(edits)
        except (OSError, RecursionError):
            self._rebuild(self.root)
            for path in sorted(edits):
                self._put(path, edits[path])

    def unchanged(self) -> bool:
        """Whether the folder holds the tree and what the harness wrote, and nothing else."""
        try:
            return self._scan() == self._recorded
        except (OSError, RecursionError):
            return False

    def edits(self) -> Edits:
        """What the harness put over the tree: the overlay, and every file written since."""
        return dict(self._edits)

    def diff(self) -> str:
        """Unified diff from the lease to now: text files only, no caches, at most `MAX_CHANGED`.

        Of a tree that was made impossible to walk, only what the harness wrote is told.
        """
        try:
            found = self._scan()
        except (OSError, RecursionError):
            found = self._recorded
        paths = {path for path, _ in found.items() ^ self._recorded.items()}
        paths |= {p for p in self._edits.keys() | self._lease.keys() if self._differs(p)}
        old: dict[str, bytes] = {}
        new: dict[str, bytes] = {}
        for path in sorted(filter(_worth_telling, paths))[:MAX_CHANGED]:
            before, after = self._at_lease(path), None
            if path in found and stat.S_ISREG(found[path][0]):
                with contextlib.suppress(SandboxError):
                    after = self.read(path)
                if after is None or not is_text(after):
                    continue
            if before is not None and not is_text(before):
                continue
            if before is not None:
                old[path] = before
            if after is not None:
                new[path] = after
        return make_patch(old, new)

    def compiled(self) -> dict[str, bytes]:
        """The `.pyc` files that belong to modules of the tree, by path."""
        found = self._scan()
        files: dict[str, bytes] = {}
        for path in found:
            folder, _, name = path.rpartition("/")
            source = folder.removesuffix("__pycache__") + name.partition(".")[0] + ".py"
            if folder.endswith("__pycache__") and name.endswith(".pyc") and source in found:
                with contextlib.suppress(SandboxError):
                    files[path] = self.read(path)
        return files

    def _differs(self, path: str) -> bool:
        absent = object()
        return self._edits.get(path, absent) != self._lease.get(path, absent)

    def _at_lease(self, path: str) -> bytes | None:
        if path in self._lease:
            return self._lease[path]
        return _pristine(self.root, path)

    # -- single files

    def read(self, path: str) -> bytes:
        """Contents of a regular file; SandboxError for anything else."""
        *folders, name = _parts(path)
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

    def write(self, path: str, data: bytes) -> None:
        """Replace or create a file; missing folders are made."""
        assert self.root is not None
        path = "/".join(_parts(path))
        if len(data) > MAX_READ_BYTES:
            raise SandboxError(f"{path}: larger than {MAX_READ_BYTES >> 20} MiB")
        for name, contents in _with_stale_bytecode(self.root, {path: data}).items():
            self._put(name, contents)

    def remove(self) -> None:
        """Delete the folder and all in it."""
        delete(self.folder)

    # -- putting things there

    def _put(self, path: str, data: bytes | None) -> None:
        """Make `path` hold `data` (None: be absent), replacing what is there; note the edit."""
        *folders, name = _parts(path)
        if data is None:
            self._recorded.pop(path, None)
            with contextlib.suppress(SandboxError), self._open_folder(folders) as folder:
                self._unlink(path, name, folder)
        else:
            with self._open_folder(folders, make=True) as folder:
                self._unlink(path, name, folder)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with open(os.open(name, flags, 0o600, dir_fd=folder), "wb", buffering=0) as file:
                    file.write(data)
                    fd = file.fileno()
                    if self.owner is not None:
                        os.fchown(fd, self.owner, self.owner)
                    os.fchmod(fd, _pristine_mode(self.root, path))
                    os.utime(fd, (moment := next(_times), moment))
                    self._recorded[path] = _signature(os.fstat(fd))
        self._edits[path] = data

    def _unlink(self, path: str, name: str, folder: int) -> None:
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            raise SandboxError(f"{path}: is a folder") from None

    @contextlib.contextmanager
    def _open_folder(self, parts: list[str], make: bool = False) -> Iterator[int]:
        """A descriptor of a folder below ours, reached through real folders only."""
        fd = os.open(self.folder, _FOLDER)
        try:
            for index, part in enumerate(parts):
                path = "/".join(parts[: index + 1])
                try:
                    below = os.open(part, _FOLDER, dir_fd=fd)
                except FileNotFoundError:
                    if not make:
                        raise SandboxError(f"{path}: no such folder") from None
                    os.mkdir(part, 0o755, dir_fd=fd)
                    below = os.open(part, _FOLDER, dir_fd=fd)
                    if self.owner is not None:
                        os.fchown(below, self.owner, self.owner)
                    self._recorded[path] = _signature(os.fstat(below))
                    self._made.add(path)
                except OSError as error:
                    raise SandboxError(f"{path}: {_reason(error)}") from None
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    # -- restoring

    def _restore(self, target: Edits) -> None:
        """Bring the folder from any state to the tree with `target` over it."""
        found = self._scan()
        known = self._recorded
        if len(found) > 2 * len(known) + MAX_CHANGED:
            raise OSError("too much to undo one by one")
        removed = "\0"
        for path in sorted(found.keys() - known.keys(), key=lambda path: path.split("/")):
            if not path.startswith(removed):  # else it went with its folder
                self._remove_found(path, found[path])
                removed = f"{path}/"
        changed = {path for path, signature in known.items() if found.get(path) != signature}
        for path in sorted(changed & found.keys(), reverse=True):
            if stat.S_ISDIR(known[path][0]) and stat.S_ISDIR(found[path][0]):
                self._own(self.folder / path)
                self._recorded[path] = _signature(os.lstat(self.folder / path))
            else:
                self._remove_found(path, found[path])
        changed |= {
            path
            for path in self._edits.keys() | target.keys()
            if path not in target or path not in self._edits or self._edits[path] != target[path]
        }
        for path in sorted(changed):
            if path in target:
                self._put(path, target[path])
            else:
                self._put_back(path)
        for path in sorted(self._made, reverse=True):
            with contextlib.suppress(OSError):  # still in use
                os.rmdir(self.folder / path)
                self._made.discard(path)
                self._recorded.pop(path, None)

    def _put_back(self, path: str) -> None:
        """Make `path` what it is in the tree."""
        assert self.root is not None
        self._edits.pop(path, None)
        self._recorded.pop(path, None)
        source, here = self.root / path, self.folder / path
        try:
            status = os.lstat(source)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is not None and stat.S_ISDIR(status.st_mode):
            if not os.path.isdir(here):
                here.mkdir(mode=0o755)
            self._own(here)
            self._recorded[path] = _signature(os.lstat(here))
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(here)
        if status is not None:
            self._copy(source, here, status)
            self._recorded[path] = _signature(os.lstat(here))

    def _remove_found(self, path: str, signature: Signature) -> None:
        here = self.folder / path
        if stat.S_ISDIR(signature[0]):
            shutil.rmtree(here)
        else:
            os.unlink(here)

    def _rebuild(self, root: Path) -> None:
        """Copy the tree afresh."""
        delete(*(self.folder / name for name in os.listdir(self.folder)))
        self._own(self.folder)
        self._recorded, self._edits, self._made = {}, {}, set()
        self.root = None  # until the copy is whole
        for path, status in _walk(root):
            here = self.folder / path
            if stat.S_ISDIR(status.st_mode):
                here.mkdir(mode=0o755)
                self._own(here)
            else:
                self._copy(root / path, here, status)
            self._recorded[path] = _signature(os.lstat(here))
        self.root = root

    def _copy(self, source: Path, here: Path, status: os.stat_result) -> None:
        """Copy a file or link, its modification time to the nanosecond."""
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), here)
        elif stat.S_ISREG(status.st_mode):
            shutil.copyfile(source, here)
            os.chmod(here, (status.st_mode & 0o777) | 0o600)
            os.utime(here, ns=(status.st_mtime_ns, status.st_mtime_ns))
        else:
            raise SandboxError(f"{source}: neither file, folder nor link")
        if self.owner is not None:
            os.lchown(here, self.owner, self.owner)

    def _scan(self) -> dict[str, Signature]:
        """Everything below the folder, by relative path."""
        found: dict[str, Signature] = {}
        base = str(self.folder)
        self._own(self.folder)
        folders = [""]
        while folders:
            prefix = folders.pop()
            try:
                entries = os.scandir(f"{base}/{prefix}")
            except PermissionError:  # closed by untrusted code, noticed by its parent's listing
                os.chmod(f"{base}/{prefix}", 0o700)
                entries = os.scandir(f"{base}/{prefix}")
            with entries:
                for entry in entries:
                    path = prefix + entry.name
                    status = entry.stat(follow_symlinks=False)
                    found[path] = _signature(status)
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(path + "/")
        return found

    def _own(self, folder: Path) -> None:
        if self.owner is not None:
            os.lchown(folder, self.owner, self.owner)
        os.chmod(folder, 0o755)

    def _uid(self) -> int:
        return os.geteuid() if self.owner is None else self.owner


def _signature(status: os.stat_result) -> Signature:
    """What changes whenever a process changes the thing: for a folder, the folder alone."""
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


def _worth_telling(path: str) -> bool:
    """Whether a diff should speak of this path, and can."""
    try:
        check_path(path).encode()
    except (PatchError, UnicodeEncodeError):
        return False
    return not path.endswith(".pyc") and not set(CACHES).intersection(path.split("/"))


def _parts(path: str) -> list[str]:
    """Components of a path that stays in the tree; SandboxError otherwise."""
    if not path or path.startswith("/") or "\0" in path or len(path) > 1000:
        raise SandboxError(f"{path[:100]!r}: give a path relative to the tree")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise SandboxError(f"{path[:100]!r}: give a path inside the tree")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise SandboxError(f"{path[:100]!r}: not a file name") from None
    return parts


def _reason(error: OSError) -> str:
    kinds = {FileNotFoundError: "no such file", NotADirectoryError: "not a folder"}
    for kind, text in kinds.items():
        if isinstance(error, kind):
            return text
    return "not a file of this tree"  # a link, mostly


def _pristine(root: Path | None, path: str) -> bytes | None:
    assert root is not None
    try:
        if stat.S_ISREG(os.lstat(root / path).st_mode):
            return (root / path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _pristine_mode(root: Path | None, path: str) -> int:
    assert root is not None
    try:
        status = os.lstat(root / path)
    except (FileNotFoundError, NotADirectoryError):
        return 0o644
    return (status.st_mode & 0o777) | 0o600 if stat.S_ISREG(status.st_mode) else 0o644


def _with_stale_bytecode(root: Path, files: Mapping[str, bytes | None]) -> Edits:
    """`files`, and None for every compiled file in the tree that belongs to one of them."""
    edits: Edits = dict(files)
    for path in files:
        folder, _, name = path.rpartition("/")
        if name.endswith(".py"):
            cache = f"{folder}/__pycache__" if folder else "__pycache__"
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for compiled in os.listdir(root / cache):
                    if compiled.startswith(name.removesuffix("py")):
                        edits.setdefault(f"{cache}/{compiled}", None)
    return edits


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a trusted folder, folders before what they hold."""
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(f"{root}/{prefix}") as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                yield prefix + entry.name, status
                if stat.S_ISDIR(status.st_mode):
                    folders.append(f"{prefix}{entry.name}/")


def delete(*paths: Path) -> None:
    """Remove files and folders, however many they hold and however they were made to resist.

    By `rm`, which minds neither depth nor the length of paths, as Python's own would.
    """
    if not paths:
        return
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        subprocess.run(
            [*command, "--", *map(str, paths)],
            env={"PATH": os.defpath},
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if not any(map(os.path.lexists, paths)):
            return
    raise OSError(f"cannot remove {paths[0]}")
