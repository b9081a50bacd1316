"""Remembered test reports: the same tree, contents and tests give the same report.

Only a run that ended by itself on a tree known to hold exactly the named contents is remembered.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from sandbox.base import Limits, TestReport, Tree


def memo_key(
    tree: Tree, edits: Mapping[str, bytes | None], ids: Sequence[str], limits: Limits, wall_s: float
) -> bytes:
    """SHA-256 over everything that a report depends on, each part with its length before it."""
    digest = hashlib.sha256()

    def add(part: bytes | None) -> None:
        digest.update(b"-" if part is None else len(part).to_bytes(8, "big") + part)

    for text in (str(tree.root), repr(tuple(tree.python_path)), repr(tuple(ids)), repr(limits)):
        add(text.encode("utf-8", "surrogatepass"))
    add(repr(wall_s).encode())
    for path in sorted(edits):
        add(path.encode("utf-8", "surrogatepass"))
        add(edits[path])
    return digest.digest()


class TestMemo:
    """At most `size` reports, the least recently used dropped first."""

    __test__ = False

    def __init__(self, size: int = 20_000) -> None:
        self.hits = 0
        self.misses = 0
        self._size = size
        self._reports: OrderedDict[bytes, TestReport] = OrderedDict()

    def get(self, key: bytes) -> TestReport | None:
        """The report under this key, if there is one."""
        report = self._reports.get(key)
        if report is None:
            self.misses += 1
        else:
            self.hits += 1
            self._reports.move_to_end(key)
        return report

    def put(self, key: bytes, report: TestReport) -> None:
        """Remember a report, unless something else than the tests ended the run."""
        if report.timed_out or report.killed_by is not None or report.exit_code not in (0, 1):
            return
        self._reports[key] = report
        if len(self._reports) > self._size:
            self._reports.popitem(last=False)
