"""One lease of one slot: the calls of `sandbox.base.Sandbox`, wherever the slot is."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

from sandbox.base import ExecResult, Limits, SandboxError, TestReport, Tree
from sandbox.memo import TestMemo, memo_key
from sandbox.report import read_report
from sandbox.slot import GRACE_S, Slot

PREBUILD_S = 300.0
WENT_UNDER = "the sandbox went down with it, and was made anew"

P = ParamSpec("P")
T = TypeVar("T")


class Owner(Protocol):
    """What a lease wants of its pool."""

    limits: Limits
    memo: TestMemo | None


class LeasedSandbox:
    """One lease of one slot; see `sandbox.base.Sandbox`.

    Test runs leave no trace: they start with empty temporary folders, and whatever they write into
    the tree is taken back, unless a command (`exec`) changed the tree before.
    """

    def __init__(self, pool: Owner, slot: Slot) -> None:
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
        self,
        ids: Sequence[str],
        *,
        timeout_s: float | None = None,
        shuffle: int | None = None,
        cpu_s: float | None = None,
    ) -> TestReport:
        """Run these pytest ids (relative to the tree's root), in one process, in file order; or,
        with a seed to `shuffle` by, in a random order across files; within `cpu_s`, if given."""
        tree, ids = self._leased(), list(dict.fromkeys(ids))
        if not ids:
            return TestReport((), 0, False, None, 0.0, "")
        async with self._busy:
            workspace, memo = self._slot.workspace, self._pool.memo
            if self._commands_ran:
                self._commands_ran = False
                await self._there()
                self._known = self._known and await in_thread(workspace.unchanged)
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
                "cpu_s": cpu_s,
                "python_path": list(tree.python_path),
            }
            self._commands_ran = True  # should this be cancelled before it is tidied up
            report = read_report(await self._ask(message, timeout_s), ids)
            if self._known:
                await in_thread(workspace.restore)
                self._commands_ran = False
            if memo is not None and key is not None:
                memo.put(key, report)
            return report

    async def read(self, path: str) -> bytes:
        """The contents of a regular file of the tree."""
        self._leased()
        async with self._busy:
            await self._there()
            return await in_thread(self._slot.workspace.read, path)

    async def write(self, path: str, data: bytes) -> None:
        """Replace or create a file of the tree; missing folders are made."""
        self._leased()
        async with self._busy:
            await self._there()
            await in_thread(self._slot.workspace.write, path, data)

    async def diff(self) -> str:
        """Unified diff from the leased tree to the present one; text files only, no caches."""
        self._leased()
        async with self._busy:
            await self._there()
            return await in_thread(self._slot.workspace.diff)

    async def reset(self, tree: Tree) -> None:
        """Make the workspace equal to `tree`; later diffs are against it."""
        async with self._busy:
            await self._started(refill=False)
            await in_thread(self._slot.workspace.lease, tree)
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
            compiled = await in_thread(self._slot.workspace.compiled)
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
        await self._started()
        began = time.monotonic()
        answer = await self._slot.ask({**message, "wall_s": wall_s}, wall_s + GRACE_S)
        if answer is not None:
            return answer
        seconds = time.monotonic() - began
        killed_by = "deadline" if seconds >= wall_s else self._slot.ended_by
        words = "" if killed_by else WENT_UNDER
        return {
            "exit_code": -9,
            "killed_by": killed_by,
            "seconds": seconds,
            "stderr": words,
            "lines": [],
            "tail": words,
        }

    async def _there(self) -> None:
        """Have the workspace at hand: one that went with its runner is made anew."""
        if not self._slot.keeps_files:
            await self._started()

    async def _started(self, refill: bool = True) -> None:
        """Have the runner started, with the workspace as the harness knows it."""
        slot = self._slot
        if slot.running:
            return
        if refill and slot.keeps_files:
            await slot.start()
        elif not slot.keeps_files:
            await slot.start()
            if refill:
                await in_thread(slot.workspace.refill)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work elsewhere; a cancelled caller still waits for it to be over."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
