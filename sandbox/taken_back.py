"""Runs of the newer release's tests with some of the changes since the older one taken back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from configs.errors import InputError
from sandbox.base import Sandbox, TestCase, Tree
from sandbox.coverage import Coverage
from sandbox.hunks import Hunk, take_back
from sandbox.packages import Package
from sandbox.source import OUTSIDE, Code, FunctionSpan

FEW_TESTS = 60


class CutShort(InputError):
    """A test run that did not reach every test: all of the rest would look as if it failed."""


class TakenBack:
    """The newer release of a pair in a sandbox, with hunks taken back for each run.

    `new_files`, `old_files`: source of either release by path; `patience_s`: for one run of tests.
    """

    def __init__(
        self,
        new: Package,
        new_files: Mapping[str, bytes],
        old_files: Mapping[str, bytes],
        measured: Coverage,
        sandbox: Sandbox,
        patience_s: float,
    ) -> None:
        self._new, self._old_files = new, old_files
        self.new_files = new_files
        self.measured = measured
        self.sandbox = sandbox
        self.patience_s = patience_s

    def files(self, hunks: Collection[Hunk]) -> dict[str, bytes]:
        """The files that hunks lie in, with these taken back."""
        return take_back(hunks, self.new_files, self._old_files)

    def tree(self, hunks: Collection[Hunk]) -> Tree:
        return Tree(self._new.tree, self.files(hunks), self._new.python_path)

    async def cases(self, hunks: Collection[Hunk], tests: Sequence[str]) -> dict[str, TestCase]:
        """What becomes of tests, by id.

        Raises CutShort if a run was, unless it was one of a few tests on a changed tree.
        """
        await self.sandbox.reset(self.tree(hunks))
        report = await self.sandbox.run_tests(tests, timeout_s=self.patience_s)
        missing = any(case.outcome == "missing" for case in report.cases)
        cut_short = report.killed_by or report.exit_code not in (0, 1)
        if missing and cut_short and (not hunks or len(tests) > FEW_TESTS):
            raise CutShort(f"the test run was cut short: {report.killed_by or report.exit_code}")
        return {case.id: case for case in report.cases}

    def feeling(self, hunks: Collection[Hunk], tests: Sequence[str]) -> list[str]:
        """Those of the tests that any of the hunks can change: for each, the ones that execute the
        function whose body it lies in; all, if it lies in none, or in one that is executed when
        modules are imported."""
        felt: set[str] = set()
        for hunk in hunks:
            around = [
                (span, body)
                for span, body in _bodies(self.new_files[hunk.path])
                if body <= hunk.new[0] + 1 and max(hunk.new[1], hunk.new[0] + 1) <= span.end_line
            ]
            # the outermost: nested functions are made, and decorated, when it runs
            place = (hunk.path, min((span.line for span, _ in around), default=0))
            if not around or place in self.measured.imported:
                return list(tests)
            felt.update(self.measured.tests.get(place, ()))
        return [id for id in tests if id in felt]

    def beside(self, hunks: Collection[Hunk], tests: Sequence[str], count: int) -> list[str]:
        """Up to `count` quick tests: half that execute the functions changed, half others."""
        paths = {hunk.path for hunk in hunks}
        inside = {
            id
            for (path, line), ids in self.measured.tests.items()
            if path in paths and _touches(hunks, path, line, self.new_files[path])
            for id in ids
        }
        near = self.measured.quickest([id for id in tests if id in inside], count // 2)
        others = [id for id in tests if id not in inside]
        return near + self.measured.quickest(others, count - len(near))


def function_at(data: bytes, line: int) -> str:
    """Qualified name of the innermost function around a line; `OUTSIDE` any of them."""
    around = [span for span, _ in _bodies(data) if span.line <= line <= span.end_line]
    return min(around, key=lambda s: s.end_line - s.line).name if around else OUTSIDE


def _touches(hunks: Collection[Hunk], path: str, line: int, data: bytes) -> bool:
    """Whether a hunk lies in the function that begins at this line."""
    end = next((s.end_line for s, _ in _bodies(data) if s.line == line), line)
    return any(h.path == path and h.new[0] < end and h.new[1] >= line - 1 for h in hunks)


@lru_cache(maxsize=64)
def _bodies(data: bytes) -> list[tuple[FunctionSpan, int]]:
    """Functions of a module, each with the first line of its body; none if it does not parse."""
    try:
        found = Code(data.decode("utf-8")).functions
    except (InputError, UnicodeDecodeError):
        return []
    return [(span, node.body[0].lineno) for span, node in found]
