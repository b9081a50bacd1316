"""Files of a workspace, carried between a harness elsewhere and the runner beside them.

Runs in the runner, imports the standard library only. Requests, each with one answer:

  {"op": "scan"}: {"changed": {PATH: SIGNATURE or null}} since the last scan, or {"failed": why}
  {"op": "read", "path": …}: {"data": base64} or {"refused": why}
  {"op": "put", "steps": [[KIND, PATH, MODE, MTIME_NS, SIZE], …], "bytes": N}, followed by the N
    bytes of all data: {"put": {…}, "made": {…}, "pruned": […]}, or {"refused" or "failed": why}
  {"op": "empty"}: {} or {"failed": why}

What is put may be the answer to another task in the same tree: it is taken from the channel by a
process of its own, so that no memory that tests inherit ever holds it.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

from treefiles import SandboxError, Signature, Step, TreeFiles


class Courier:
    """Answers requests about the files below `folder`."""

    def __init__(self, folder: str) -> None:
        self._files = TreeFiles(folder, None)
        self._seen: dict[str, Signature] = {}

    def answer(
        self, request: Mapping[str, Any], channel: int, answers: int
    ) -> dict[str, Any] | None:
        """The answer, or None if another process gave it. `channel` is where data comes from."""
        match request["op"]:
            case "scan":
                return attempt(self._scan)
            case "read":
                return attempt(
                    lambda: {"data": base64.b64encode(self._files.read(request["path"])).decode()}
                )
            case "put":
                self._apart(lambda: self._put(request, channel), answers)
            case "empty":
                self._apart(self._empty, answers)
            case other:
                raise ValueError(f"no request {other!r}")
        return None

    def _scan(self) -> dict[str, Any]:
        seen, self._seen = self._seen, {}  # what a scan that fails leaves
        found = self._files.scan()
        changed: dict[str, Signature | None] = {
            path: signature for path, signature in found.items() if seen.get(path) != signature
        }
        changed.update(dict.fromkeys(seen.keys() - found.keys()))
        self._seen = found
        return {"changed": changed}

    def _put(self, request: Mapping[str, Any], channel: int) -> dict[str, Any]:
        data = memoryview(take(channel, request["bytes"]))
        steps, at = [], 0
        for kind, path, mode, mtime_ns, size in request["steps"]:
            steps.append(Step(kind, path, bytes(data[at : at + size]), mode, mtime_ns))
            at += size
        return vars(self._files.apply(steps))

    def _empty(self) -> dict[str, Any]:
        self._files.empty()
        return {}

    def _apart(self, work: Callable[[], dict[str, Any]], answers: int) -> None:
        """Do it, and answer, in a forked process."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                body = json.dumps(attempt(work)).encode()
                data = memoryview(struct.pack(">I", len(body)) + body)
                while data:
                    data = data[os.write(answers, data) :]
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status:
            print(f"a process that handled files ended with {status}", file=sys.stderr)
            os._exit(70)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, or what kept it from that."""
    try:
        return work()
    except SandboxError as error:
        return {"refused": str(error)}
    except (OSError, RecursionError) as error:
        return {"failed": str(error)}


def take(channel: int, count: int) -> bytearray:
    """Exactly `count` bytes; ends the process at the end of input."""
    data = bytearray()
    while len(data) < count:
        chunk = os.read(channel, min(count - len(data), 1 << 20))
        if not chunk:
            os._exit(1)
        data += chunk
    return data
