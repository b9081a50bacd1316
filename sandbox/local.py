"""Sandboxes on this machine, without a daemon: a pool of warm runners, leased one tree at a time.

pool = LocalPool(size=2)
async with pool.lease(tree) as sandbox:
    report = await sandbox.run_tests(["tests/test_a.py::test_b"])
await pool.close()
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from sandbox.base import Limits, SandboxBroken, Tree
from sandbox.isolation import Launch, environment_hash, launch, plain_user, spare_uid
from sandbox.leased import LeasedSandbox
from sandbox.memo import TestMemo
from sandbox.slot import ProcessSlot
from sandbox.treefiles import delete

BACKENDS = ("auto", "bwrap", "plain")
PREFIX = "remend-"
_ROOM_BYTES = 256 << 20  # free memory file system wanted for each slot, or the disk is used


class LocalPool:
    """Up to `size` sandboxes at a time, started when first wanted, in a private folder.

    `backend`: "bwrap", "plain", or "auto": the first if it works here. After the first lease the
    attribute tells which it is. `memo`, if given, answers test runs that were made before. `warn`
    is told, once, what the plain backend does not contain. `shell`: agents will have one inside.
    Use it from a thread that lives as long as the pool does: sandboxes die with it.
    """

    def __init__(
        self,
        size: int,
        limits: Limits | None = None,
        backend: str = "auto",
        memo: TestMemo | None = None,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        shell: bool = False,
    ) -> None:
        if size < 1:
            raise InputError(f"a sandbox pool needs at least one slot, not {size}")
        if backend not in BACKENDS:
            raise InputError(f"no sandbox backend {backend!r}: there are {', '.join(BACKENDS)}")
        self.size = size
        self.limits = limits or Limits()
        self.backend = backend
        self.memo = memo
        self._shell = shell
        self._warn = warn
        self._warned = False
        self._folder: Path | None = None
        self._lock_fd = -1
        self._slots: list[ProcessSlot] = []
        self._idle: list[ProcessSlot] = []
        self._waiting: deque[asyncio.Future[ProcessSlot | None]] = deque()
        self._wanted = 0  # slots there are or that are being started
        self._closed = False
        self._choosing = asyncio.Lock()
        self._owner_pid = os.getpid()

    async def __aenter__(self) -> LocalPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def lease(self, tree: Tree) -> AsyncIterator[LeasedSandbox]:
        """A sandbox that holds `tree`; first come, first served. Raises SandboxBroken, or
        InputError if the wanted backend is not there."""
        slot = await self._take(tree.root)
        try:
            sandbox = LeasedSandbox(self, slot)
            await sandbox.reset(tree)
            try:
                yield sandbox
            finally:
                await sandbox.close()
        finally:
            self._give(slot)

    @property
    def environment(self) -> str:
        """SHA-256 of what sandboxes find installed, as far as it decides how tests go."""
        found = environment_hash()
        if self._shell and self.backend == "bwrap":
            found = hashlib.sha256(f"{found} without other software".encode()).hexdigest()
        return found

    def metrics(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        """End every runner and remove every file. Leases still held break."""
        self._closed = True
        for future in self._waiting:
            future.cancel()
        slots, self._slots, self._idle = self._slots, [], []
        for slot in slots:
            await slot.stop()
        self._remove_folder()

    # -- slots

    async def _take(self, root: Path) -> ProcessSlot:
        if self._closed:
            raise RuntimeError("this sandbox pool has been closed")
        if self._idle:
            # the one that holds this tree already, else the one that has idled longest
            same = [slot for slot in self._idle if slot.workspace.root == root]
            slot = (same or self._idle)[0]
            self._idle.remove(slot)
            return slot
        if self._wanted < self.size:
            self._wanted += 1
            try:
                slot = await self._new_slot()
            except BaseException:
                self._wanted -= 1
                self._give(None)
                raise
            self._slots.append(slot)
            return slot
        future: asyncio.Future[ProcessSlot | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            given = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give(future.result())
            raise
        return given or await self._take(root)

    def _give(self, slot: ProcessSlot | None) -> None:
        """Hand a slot to whoever waits longest; None: the right to start one."""
        if slot is not None and slot not in self._slots:
            return  # closed meanwhile
        if not self._pass_on(slot) and slot is not None:
            self._idle.append(slot)

    def _pass_on(self, slot: ProcessSlot | None) -> bool:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return True
        return False

    async def _new_slot(self) -> ProcessSlot:
        if self._folder is None:
            self._make_folder()
        if self.backend == "auto":
            async with self._choosing:
                if self.backend == "auto":
                    return await self._choose()
        slot = await self._start_slot(self.backend)
        if self.backend == "plain":
            self._warn_once(slot, "it was asked for")
        return slot

    async def _choose(self) -> ProcessSlot:
        """The first slot, with whichever backend works."""
        try:
            slot = await self._start_slot("bwrap")
            self.backend = "bwrap"
        except (SandboxBroken, InputError) as error:
            slot = await self._start_slot("plain")
            self.backend = "plain"
            self._warn_once(slot, f"bubblewrap does not work here: {error}")
        return slot

    def _warn_once(self, slot: ProcessSlot, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(plain_warning(slot, reason))

    async def _start_slot(self, backend: str) -> ProcessSlot:
        assert self._folder is not None
        uid, reads_all = plain_user() if backend == "plain" else (spare_uid(), False)
        if backend == "plain":
            self._folder.chmod(0o711)  # a spare user must reach its folder
        folder = Path(tempfile.mkdtemp(prefix="slot-", dir=self._folder))
        folder.chmod(0o755)
        try:
            slot = ProcessSlot(folder, uid, self._launch(backend, folder, uid, reads_all))
            await slot.start()
            if self._closed:
                await slot.stop()
                raise SandboxBroken("the pool was closed while a sandbox started")
        except BaseException:
            delete(folder)
            raise
        return slot

    def _launch(self, backend: str, folder: Path, uid: int | None, reads_all: bool) -> Launch:
        return launch(backend, folder, uid, self.limits, reads_all, self._shell)

    # -- the pool's folder

    def _make_folder(self) -> None:
        """A private folder, in memory if there is room, with a lock that tells we live."""
        home = Path("/dev/shm")
        try:
            room = shutil.disk_usage(home).free >= self.size * _ROOM_BYTES
        except OSError:
            room = False
        if not room or not os.access(home, os.W_OK | os.X_OK):
            home = Path(tempfile.gettempdir())
        sweep(home)
        # under another name until it is locked: an unlocked one is swept
        fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=home))
        self._lock_fd = os.open(fresh / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        self._folder = home / fresh.name.removeprefix(".")
        os.rename(fresh, self._folder)
        atexit.register(self._abandon)

    def _remove_folder(self) -> None:
        if self._folder is not None:
            delete(self._folder)
            os.close(self._lock_fd)
            self._folder = None
            atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """At the interpreter's end, if nobody closed the pool."""
        if os.getpid() == self._owner_pid:
            for slot in self._slots:
                slot.stop_now()
            self._remove_folder()


def sweep(home: Path) -> None:
    """Remove folders of ours below `home` whose harness has died."""
    for folder in home.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.geteuid() or folder.is_symlink():
                continue
            fd = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                delete(folder)
            finally:
                os.close(fd)


def plain_warning(slot: ProcessSlot, reason: str) -> str:
    """What a user must know before running untrusted code with the plain backend."""
    lines = [
        "remend: WARNING: code under repair runs in the plain sandbox, which does NOT isolate it.",
        f"  Why: {reason}.",
        "  It can read every file that you can.",
    ]
    if slot.facts["uid"] == os.geteuid():
        lines.append("  It runs as you, and can write every file that you can.")
    if not slot.facts["namespaces"]:
        if not slot.facts["filter"]:
            lines.append("  It can use the network.")
        lines.append("  It can see, and may signal, your other processes.")
    return "\n".join(lines)


async def prebuild(
    root: Path, python_path: Sequence[str], test_paths: Sequence[str], pool: LocalPool
) -> int:
    """Put `__pycache__` into a pristine tree: its modules, and its tests as pytest rewrites them.

    Call it once for each fresh tree, after its modification times are final and before any task
    leases it: sandboxes never write `.pyc` files, but read these, which makes every later test run
    faster. `python_path` and `test_paths` (files) are relative to `root`. Everything is compiled
    inside a sandbox. Returns the number of files written; what does not compile is left out.
    """
    tree = Tree(root, {}, tuple(python_path))
    async with pool.lease(tree) as sandbox:
        compiled = await sandbox.prebuild(test_paths)
    for path, data in compiled.items():
        write_atomic(root / path, data)
    return len(compiled)
