"""Run a package's tests and tell which of its functions each test executes.

Runs inside a sandbox, read from standard input: `python - [pytest arguments]`, in the tree's root.
Prints one JSON object: `functions` [[path, first line]], `tests` {id: {outcome, seconds,
functions: [index]}}, `imported` [index]: those executed before any test, when modules were imported
and tests collected.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import CodeType, FrameType

import pytest

ROOT = os.getcwd() + "/"


class Probe:
    def __init__(self) -> None:
        self.tests: dict[str, dict] = {}
        self.functions: dict[tuple[str, int], int] = {}
        self._imported: set[CodeType] = set()

    def watch_imports(self) -> None:
        """Note what is executed from now on until the first test."""
        trace_calls(self._imported)

    def imported(self) -> list[int]:
        stop_tracing()  # no test did, where none was run
        return self._places(self._imported)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        seen: set[CodeType] = set()
        record = self.tests.setdefault(item.nodeid, {"outcome": "missing"})
        began = time.perf_counter()
        trace_calls(seen)
        yield
        stop_tracing()
        record["seconds"] = round(time.perf_counter() - began, 4)
        record["functions"] = self._places(seen)

    def _places(self, seen: set[CodeType]) -> list[int]:
        """Those of the tree, by their number."""
        return sorted(
            self.functions.setdefault(
                (code.co_filename.removeprefix(ROOT), code.co_firstlineno), len(self.functions)
            )
            for code in seen
            if code.co_filename.startswith(ROOT)
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        record = self.tests[report.nodeid]
        if hasattr(report, "wasxfail") or report.outcome == "skipped":
            record["outcome"] = "skipped"
        elif report.outcome == "failed":
            record["outcome"] = "failed"
        elif report.when == "call" and record["outcome"] == "missing":
            record["outcome"] = "passed"


def trace_calls(seen: set[CodeType]) -> None:
    """Put the code of every call from now on into `seen`."""

    def enter(frame: FrameType, event: str, arg: object) -> None:
        # no local trace function: lines are not traced, only calls
        seen.add(frame.f_code)

    sys.settrace(enter)
    threading.settrace(enter)


def stop_tracing() -> None:
    sys.settrace(None)
    threading.settrace(None)


def main() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)
    probe = Probe()
    probe.watch_imports()
    pytest.main(sys.argv[1:], plugins=[probe])
    imported = probe.imported()
    functions = sorted(probe.functions, key=lambda key: probe.functions[key])
    with os.fdopen(answer, "w") as file:
        json.dump({"functions": functions, "tests": probe.tests, "imported": imported}, file)


main()
