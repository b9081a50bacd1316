"""The files of a workspace that lies beside its runner, reached through it (`sandbox.courier`)."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sandbox.base import SandboxBroken, SandboxError
from sandbox.slot import Slot
from sandbox.treefiles import Done, Signature, Step

FILES_S = 60.0


class RemoteFiles:
    """`sandbox.workspace.Files` of `slot`. Called from worker threads while `loop()` runs.

    Raises SandboxBroken when the runner does not answer.
    """

    def __init__(self, slot: Slot, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._slot, self._loop = slot, loop
        self._seen: dict[str, Signature] = {}

    def forget(self) -> None:
        """The runner is a new one, with an empty workspace."""
        self._seen = {}

    def scan(self) -> dict[str, Signature]:
        seen, self._seen = self._seen, {}
        for path, signature in self._ask({"op": "scan"})["changed"].items():
            if signature is None:
                seen.pop(path, None)
            else:
                seen[path] = tuple(signature)
        self._seen = seen
        return dict(seen)

    def read(self, path: str) -> bytes:
        return base64.b64decode(self._ask({"op": "read", "path": path})["data"])

    def apply(self, steps: Sequence[Step]) -> Done:
        told = [[s.kind, s.path, s.mode, s.mtime_ns, len(s.data)] for s in steps]
        data = b"".join(step.data for step in steps)
        answer = self._ask({"op": "put", "steps": told, "bytes": len(data)}, data)
        put, made = (
            {path: tuple(signature) for path, signature in answer[key].items()}
            for key in ("put", "made")
        )
        return Done(put, made, answer["pruned"])

    def empty(self) -> None:
        self._ask({"op": "empty"})

    def _ask(self, message: Mapping[str, Any], payload: bytes = b"") -> dict[str, Any]:
        work = self._slot.ask(message, FILES_S, payload)
        answer = asyncio.run_coroutine_threadsafe(work, self._loop()).result()
        if answer is None:
            raise SandboxBroken("the sandbox's runner ended while it handled files")
        if "refused" in answer:
            raise SandboxError(answer["refused"])
        if "failed" in answer:
            raise OSError(answer["failed"])
        return answer
