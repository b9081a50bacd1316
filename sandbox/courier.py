"""Files of a workspace, carried between a harness elsewhere and the runner beside them.

Runs in the runner, imports the standard library only. Requests, each with one answer:

  {"op": "scan"}: {"changed": {PATH: SIGNATURE or null}} since the last scan, or {"failed": why}
  {"op": "read", "path": …}: {"data": base64} or {"refused": why}
  {"op": "put", "steps": [[KIND, PATH, MODE, MTIME_NS, SIZE], …], "bytes": N}, followed by the N
    bytes of all data: {"put": {…}, "made": {…}, "pruned": […]}, or {"refused" or "failed": why}
  {"op": "empty"}: {} or {"failed": why}

What is put may be the answer to another task in the same tree: it goes from the channel into pages
of its own and from there to the files, and the pages go back to the kernel. So no memory that tests
inherit ever holds it.
"""

from __future__ import annotations

import base64
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from treefiles import SandboxError, Signature, Step, TreeFiles


class Courier:
    """Answers requests about the files below `folder`."""

    def __init__(self, folder: str) -> None:
        self._files = TreeFiles(folder, None)
        self._seen: dict[str, Signature] = {}

    def answer(self, request: Mapping[str, Any], channel: int) -> dict[str, Any]:
        """The answer to a request; `channel` is where the data of a "put" comes from."""
        match request["op"]:
            case "scan":
                return attempt(self._scan)
            case "read":
                return attempt(lambda: self._read(request["path"]))
            case "put":
                return self._put(request, channel)
            case "empty":
                return attempt(self._empty)
            case other:
                raise ValueError(f"no request {other!r}")

    def _read(self, path: str) -> dict[str, Any]:
        return {"data": base64.b64encode(self._files.read(path)).decode()}

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
        with mmap.mmap(-1, max(1, request["bytes"])) as pages:
            with memoryview(pages) as data:
                fill(data[: request["bytes"]], channel)
                return attempt(lambda: vars(self._files.apply(list(_steps(request, data)))))

    def _empty(self) -> dict[str, Any]:
        self._files.empty()
        return {}


def _steps(request: Mapping[str, Any], data: memoryview) -> Iterator[Step]:
    at = 0
    for kind, path, mode, mtime_ns, size in request["steps"]:
        yield Step(kind, path, data[at : at + size], mode, mtime_ns)
        at += size


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, or what kept it from that."""
    try:
        return work()
    except SandboxError as error:
        return {"refused": str(error)}
    except (OSError, RecursionError) as error:
        return {"failed": str(error)}


def fill(data: memoryview, channel: int) -> None:
    """Read as much as `data` holds; ends the process at the end of input."""
    while data:
        count = os.readv(channel, [data])
        if not count:
            os._exit(0)
        data = data[count:]
