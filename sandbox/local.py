"""Sandboxes on this machine, without a daemon: a pool of warm runners, leased one tree at a time.

pool = LocalPool(size=2)
async with pool.lease(tree) as sandbox:
    report = await sandbox.run_tests(["tests/test_a.py::test_b"])
await pool.close()
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import fcntl
import os
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from configs.errors import InputError
from configs.files import write_atomic
from sandbox.base import (
    ExecResult,
    Limits,
    SandboxBroken,
    SandboxError,
    TestReport,
    Tree,
)
from sandbox.isolation import (
    Launch,
    launch,
    plain_user,
    spare_uid,
)
from sandbox.memo import TestMemo, memo_key
from sandbox.report import read_report
from sandbox.slot import GRACE_S, Slot
from sandbox.workspace import delete

BACKENDS = ("auto", "bwrap", "plain")
PREFIX = "remend-"
PREBUILD_S = 300.0
_ROOM_BYTES = 256 << 20  # free memory file system wanted for each slot, or the disk is used

P = ParamSpec("P")
T = TypeVar("T")


class LocalPool:
    """Up to `size` sandboxes at a time, started when first wanted, in a private folder.

    `backend`: "bwrap", "plain", or "auto": the first if it works here. After the first lease the
    attribute tells which it is. `memo`, if given, answers test runs that were made before. `warn`
    is told, once, what the plain backend does not contain.
    Use it from a thread that lives as long as the pool does: sandboxes die with it.
    """

    def __init__(
        self,
        size: int,
        limits: Limits | None = None,
        backend: str = "auto",
        memo: TestMemo | None = None,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        if size < 1:
            raise InputError(f"a sandbox pool needs at least one slot, not {size}")
        if backend not in BACKENDS:
            raise InputError(f"no sandbox backend {backend!r}: there are {', '.join(BACKENDS)}")
        self.size = size
        self.limits = limits or Limits()
        self.backend = backend
        self.memo = memo
        self._warn = warn
        self._warned = False
        self._folder: Path | None = None
        self._lock_fd = -1
        self._slots: list[Slot] = []
        self._idle: list[Slot] = []
        self._waiting: deque[asyncio.Future[Slot | None]] = deque()
        self._wanted = 0  # slots there are or that are being started
        self._closed = False
        self._choosing = asyncio.Lock()
        self._owner_pid = os.getpid()

    async def __aenter__(self) -> LocalPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def lease(self, tree: Tree) -> AsyncIterator[LocalSandbox]:
        """A sandbox that holds `tree`; first come, first served. Raises SandboxBroken, or
        InputError if the wanted backend is not there."""
        slot = await self._take(tree.root)
        try:
            sandbox = LocalSandbox(self, slot)
            await sandbox.reset(tree)
            try:
                yield sandbox
            finally:
                await sandbox.close()
        finally:
            self._give(slot)

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

    async def _take(self, root: Path) -> Slot:
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
        future: asyncio.Future[Slot | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            given = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give(future.result())
            raise
        return given or await self._take(root)

    def _give(self, slot: Slot | None) -> None:
        """Hand a slot to whoever waits longest; None: the right to start one."""
        if slot is not None and slot not in self._slots:
            return  # closed meanwhile
        if not self._pass_on(slot) and slot is not None:
            self._idle.append(slot)

    def _pass_on(self, slot: Slot | None) -> bool:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return True
        return False

    async def _new_slot(self) -> Slot:
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

    async def _choose(self) -> Slot:
        """The first slot, with whichever backend works."""
        try:
            slot = await self._start_slot("bwrap")
            self.backend = "bwrap"
        except (SandboxBroken, InputError) as error:
            slot = await self._start_slot("plain")
            self.backend = "plain"
            self._warn_once(slot, f"bubblewrap does not work here: {error}")
        return slot

    def _warn_once(self, slot: Slot, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(plain_warning(slot, reason))

    async def _start_slot(self, backend: str) -> Slot:
        assert self._folder is not None
        uid, reads_all = plain_user() if backend == "plain" else (spare_uid(), False)
        if backend == "plain":
            self._folder.chmod(0o711)  # a spare user must reach its folder
        folder = Path(tempfile.mkdtemp(prefix="slot-", dir=self._folder))
        folder.chmod(0o755)
        try:
            slot = Slot(folder, uid, self._launch(backend, folder, uid, reads_all))
            await slot.start()
            if self._closed:
                await slot.stop()
                raise SandboxBroken("the pool was closed while a sandbox started")
        except BaseException:
            delete(folder)
            raise
        return slot

    def _launch(self, backend: str, folder: Path, uid: int | None, reads_all: bool) -> Launch:
        return launch(backend, folder, uid, self.limits, reads_all)

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


def plain_warning(slot: Slot, reason: str) -> str:
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


class LocalSandbox:
    """One lease of one slot; see `sandbox.base.Sandbox`.

    Test runs leave no trace: they start with empty temporary folders, and whatever they write into
    the tree is taken back, unless a command (`exec`) changed the tree before.
    """

    def __init__(self, pool: LocalPool, slot: Slot) -> None:
        self._pool = pool
        self._slot = slot
        self._tree: Tree | None = None
        self._busy = asyncio.Lock()
        self._commands_ran = False  # since it was last known what the tree holds
        self._known = True

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> ExecResult:
        """Run a command in the tree's root; everything it started is gone when this returns."""
        if not argv or not argv[0] or any("\0" in part for part in argv):
            raise SandboxError("a command needs a name, and no NUL bytes")
        message = {
            "op": "exec",
            "argv": list(argv),
            "stdin": base64.b64encode(stdin).decode(),
            "python_path": list(self._leased().python_path),
        }
        async with self._busy:
            self._commands_ran = True
            self._slot.untidy = True
            answer = await self._ask(message, timeout_s)
        return ExecResult(
            exit_code=answer["exit_code"],
            stdout=answer.get("stdout", ""),
            stderr=answer.get("stderr", ""),
            timed_out=answer["killed_by"] == "deadline",
            killed_by=answer["killed_by"],
            seconds=answer["seconds"],
        )

    async def run_tests(
        self, ids: Sequence[str], *, timeout_s: float | None = None, shuffle: int | None = None
    ) -> TestReport:
        """Run these pytest ids (relative to the tree's root), in one process, in file order; or,
        with a seed to `shuffle` by, in a random order across files."""
        tree, ids = self._leased(), list(dict.fromkeys(ids))
        if not ids:
            return TestReport((), 0, False, None, 0.0, "")
        async with self._busy:
            workspace, memo = self._slot.workspace, self._pool.memo
            if self._commands_ran:
                self._commands_ran = False
                self._known = self._known and await _in_thread(workspace.unchanged)
            key = None
            if memo is not None and self._known:
                wall_s = self._pool.limits.wall_s if timeout_s is None else timeout_s
                order = ids if shuffle is None else [*ids, str(shuffle)]
                key = memo_key(tree, workspace.edits(), order, self._pool.limits, wall_s)
                if (report := memo.get(key)) is not None:
                    return report
            message = {
                "op": "test",
                "ids": ids if shuffle is None else random.Random(shuffle).sample(ids, len(ids)),
                "shuffled": shuffle is not None,
                "python_path": list(tree.python_path),
            }
            self._commands_ran = True  # should this be cancelled before it is tidied up
            report = read_report(await self._ask(message, timeout_s), ids)
            if self._known:
                await _in_thread(workspace.restore)
                self._commands_ran = False
            if memo is not None and key is not None:
                memo.put(key, report)
            return report

    async def read(self, path: str) -> bytes:
        """The contents of a regular file of the tree."""
        self._leased()
        async with self._busy:
            return self._slot.workspace.read(path)

    async def write(self, path: str, data: bytes) -> None:
        """Replace or create a file of the tree; missing folders are made."""
        self._leased()
        async with self._busy:
            self._slot.workspace.write(path, data)

    async def diff(self) -> str:
        """Unified diff from the leased tree to the present one; text files only, no caches."""
        self._leased()
        async with self._busy:
            return await _in_thread(self._slot.workspace.diff)

    async def reset(self, tree: Tree) -> None:
        """Make the workspace equal to `tree`; later diffs are against it."""
        async with self._busy:
            await _in_thread(self._slot.workspace.lease, tree)
            self._tree, self._known, self._commands_ran = tree, True, False
            if self._slot.untidy and self._slot.running:
                await self._slot.ask({"op": "wipe"}, GRACE_S)
            self._slot.untidy = False

    async def prebuild(self, test_paths: Sequence[str]) -> dict[str, bytes]:
        """Compile every module of the tree, and collect `test_paths`: the `.pyc` files, by path."""
        message = {
            "op": "prebuild",
            "ids": list(test_paths),
            "python_path": list(self._leased().python_path),
        }
        async with self._busy:
            self._commands_ran = True
            await self._ask(message, PREBUILD_S)
            compiled = await _in_thread(self._slot.workspace.compiled)
            self._slot.workspace.root = None  # the tree is about to change: copy it anew
            return compiled

    async def close(self) -> None:
        """Give the sandbox back."""
        self._tree = None

    def _leased(self) -> Tree:
        if self._tree is None:
            raise RuntimeError("this sandbox has been given back")
        return self._tree

    async def _ask(self, message: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
        """Put a request to the runner, started if need be; an answer even if it does not live."""
        wall_s = self._pool.limits.wall_s if timeout_s is None else timeout_s
        if not self._slot.running:
            await self._slot.start()
        began = time.monotonic()
        answer = await self._slot.ask({**message, "wall_s": wall_s}, wall_s + GRACE_S)
        if answer is not None:
            return answer
        seconds = time.monotonic() - began
        return {
            "exit_code": -9,
            "killed_by": "deadline" if seconds >= wall_s else None,
            "seconds": seconds,
            "lines": [],
            "tail": "",
        }


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


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work elsewhere; a cancelled caller still waits for it to be over."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
