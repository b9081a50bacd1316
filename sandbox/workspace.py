"""A sandbox's working copy of a tree, as the harness sees it: filled, restored, read and compared.

What lies there was last touched by untrusted code, though none of it runs while the harness looks.
What changed is told by inode, size and change time, so that restoring a tree costs one `lstat` a
file. The pristine tree stays on this side: it holds the answer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sandbox.base import SandboxError, Tree
from sandbox.patch import PatchError, check_path, is_text, make_patch
from sandbox.treefiles import MAX_READ_BYTES, Done, Signature, Step, parts

MAX_CHANGED = 1000
CACHES = ("__pycache__", ".pytest_cache")

# Contents put over a tree get a modification time of their own, in whole seconds because that is
# what a `.pyc` records, and of a time no archive holds: no compiled file can pass for theirs.
_times = itertools.count(4_102_444_800)  # the year 2100

Edits = dict[str, bytes | None]  # path -> contents that differ from the tree's; None: no such file


class Files(Protocol):
    """Where the working copy lies: `sandbox.treefiles.TreeFiles` here or in a container."""

    def scan(self) -> dict[str, Signature]: ...
    def read(self, path: str) -> bytes: ...
    def apply(self, steps: Sequence[Step]) -> Done: ...
    def empty(self) -> None: ...


class Workspace:
    """The working copy in `files`, empty at first."""

    def __init__(self, files: Files) -> None:
        self.root: Path | None = None
        self._files = files
        self._lease: Edits = {}
        self._edits: Edits = {}
        self._recorded: dict[str, Signature] = {}
        self._made: set[str] = set()  # folders that are not in the tree

    # -- the state as a whole

    def lease(self, tree: Tree) -> None:
        """Make the folder equal to `tree`, whatever was done to it, at the least cost."""
        for path in tree.overlay:
            parts(path)
        target = _with_stale_bytecode(tree.root, dict(tree.overlay))
        if tree.root == self.root:
            try:
                self._restore(target)
                self._lease = dict(target)
                return
            except (OSError, RecursionError):
                pass  # a tree made to be hard to walk
        self._fill(tree.root, target)
        self._lease = dict(target)

    def restore(self) -> None:
        """Undo whatever processes changed since the harness last wrote."""
        try:
            self._restore(dict(self._edits))
        except (OSError, RecursionError):
            self.refill()

    def refill(self) -> None:
        """Put everything there anew: the tree, and what the harness wrote over it."""
        assert self.root is not None
        self._fill(self.root, dict(self._edits))

    def unchanged(self) -> bool:
        """Whether the folder holds the tree and what the harness wrote, and nothing else."""
        try:
            return self._files.scan() == self._recorded
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
            found = self._files.scan()
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
        found = self._files.scan()
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
        parts(path)
        return self._files.read(path)

    def write(self, path: str, data: bytes) -> None:
        """Replace or create a file; missing folders are made."""
        assert self.root is not None
        path = "/".join(parts(path))
        if len(data) > MAX_READ_BYTES:
            raise SandboxError(f"{path}: larger than {MAX_READ_BYTES >> 20} MiB")
        edits = _with_stale_bytecode(self.root, {path: data})
        self._apply([self._edit(name, contents) for name, contents in edits.items()], edits)

    # -- putting things there

    def _edit(self, path: str, data: bytes | None) -> Step:
        """The step that makes `path` hold `data` (None: be absent)."""
        assert self.root is not None
        if data is None:
            return Step("unlink", path)
        return Step("file", path, data, _pristine_mode(self.root, path), next(_times) * 10**9)

    def _apply(self, steps: Iterable[Step], edits: Mapping[str, bytes | None]) -> None:
        """Take steps, among them those that make `edits`, and note what is there then."""
        steps = list(steps)
        done = self._files.apply(steps) if steps else Done()
        for step in steps:
            if step.kind in ("unlink", "remove"):
                self._recorded.pop(step.path, None)
        self._recorded.update(done.made | done.put)
        self._made.update(done.made)
        for path in done.pruned:
            self._made.discard(path)
            self._recorded.pop(path, None)
        self._edits.update(edits)

    def _restore(self, target: Edits) -> None:
        """Bring the folder from any state to the tree with `target` over it."""
        found, known = self._files.scan(), self._recorded
        if len(found) > 2 * len(known) + MAX_CHANGED:
            raise OSError("too much to undo one by one")
        steps: list[Step] = []
        removed = "\0"
        for path in sorted(found.keys() - known.keys(), key=lambda path: path.split("/")):
            if not path.startswith(removed):  # else it goes with its folder
                steps.append(Step("remove", path))
                removed = f"{path}/"
        changed = {path for path, signature in known.items() if found.get(path) != signature}
        for path in sorted(changed & found.keys(), reverse=True):
            if not (stat.S_ISDIR(known[path][0]) and stat.S_ISDIR(found[path][0])):
                steps.append(Step("remove", path))
        changed |= {
            path
            for path in self._edits.keys() | target.keys()
            if path not in target or path not in self._edits or self._edits[path] != target[path]
        }
        for path in sorted(changed):
            if path in target:
                steps.append(self._edit(path, target[path]))
            else:
                self._edits.pop(path, None)
                steps.append(self._original(path))
        steps += [Step("prune", path) for path in sorted(self._made, reverse=True)]
        self._apply(steps, {path: target[path] for path in changed & target.keys()})

    def _original(self, path: str) -> Step:
        """The step that makes `path` what it is in the tree."""
        assert self.root is not None
        if path in self._made:  # changed and not wanted: made anew where something needs it
            return Step("folder", path)
        try:
            status = os.lstat(self.root / path)
        except (FileNotFoundError, NotADirectoryError):
            return Step("unlink", path)
        return _copy(self.root / path, path, status)

    def _fill(self, root: Path, target: Edits) -> None:
        """Copy the tree afresh, and put `target` over it.

        The tree's own contents of what lies under `target` stay here: they may be the answer.
        """
        self._recorded, self._edits, self._made = {}, {}, set()
        self.root = None  # until the copy is whole
        self._files.empty()
        steps = [_copy(root / p, p, status) for p, status in _walk(root) if p not in target]
        self.root = root
        try:
            edits = [self._edit(path, target[path]) for path in sorted(target)]
            self._apply([*steps, *edits], target)
        except BaseException:
            self.root = None
            raise


def _copy(source: Path, path: str, status: os.stat_result) -> Step:
    """A step for a file, folder or link of a pristine tree, its time kept to the nanosecond."""
    if stat.S_ISDIR(status.st_mode):
        return Step("folder", path)
    if stat.S_ISLNK(status.st_mode):
        return Step("link", path, os.fsencode(os.readlink(source)))
    if stat.S_ISREG(status.st_mode):
        mode = (status.st_mode & 0o777) | 0o600
        return Step("file", path, source.read_bytes(), mode, status.st_mtime_ns)
    raise SandboxError(f"{source}: neither file, folder nor link")


def _worth_telling(path: str) -> bool:
    """Whether a diff should speak of this path, and can."""
    try:
        check_path(path).encode()
    except (PatchError, UnicodeEncodeError):
        return False
    return not path.endswith(".pyc") and not set(CACHES).intersection(path.split("/"))


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
