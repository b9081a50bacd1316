"""Run pytest in this process and tell, as JSON lines on a descriptor, what became of each test.

Runs inside the sandbox in a freshly forked child; imports the standard library and pytest only.
Tests under repair run the way `pytest` runs them, less its reporting: no terminal, no cache, no
settings of the tree (`conftest.py` files count), and only the tests asked for are ever created.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

MAX_FRAMES = 30
MAX_TEXT = 2000

# what costs time and gives the tests nothing
_WITHOUT = (
    *("terminal", "cacheprovider", "junitxml", "pastebin", "doctest", "faulthandler", "stepwise"),
    *("setuponly", "setupplan", "debugging", "threadexception", "unraisableexception"),
)
ARGUMENTS = [
    *("-c", os.devnull, "--rootdir", ".", "--confcutdir", ".", "--continue-on-collection-errors"),
    *(f"-pno:{name}" for name in _WITHOUT),
]


def run(ids: Sequence[str], report_fd: int) -> int:
    """Run the tests `ids` below the current directory; pytest's exit code."""
    reporter = _Reporter(ids, report_fd)
    files = [path for path in reporter.files if os.path.isfile(path)]
    for path in reporter.files.keys() - set(files):
        print(f"no such test file: {path}", file=sys.stderr)
    if not files:
        return int(pytest.ExitCode.USAGE_ERROR)
    return int(pytest.main([*ARGUMENTS, *files], plugins=[reporter]))


def prebuild(paths: Sequence[str]) -> int:
    """Collect test files so that every module they import, and they, leave their `.pyc` files."""
    files = [path for path in paths if os.path.isfile(path)]
    return int(pytest.main([*ARGUMENTS, "--collect-only", *files]))


class _Reporter:
    """A pytest plugin: lets only the wanted tests come into being, and reports how they went."""

    def __init__(self, ids: Sequence[str], report_fd: int) -> None:
        self._fd = report_fd
        self._root = os.getcwd()
        self._wanted = set(ids)
        # tests/test_a.py::Class::test[x] wants the nodes tests/test_a.py::Class and …::test
        self._nodes: set[str] = set()
        self.files: dict[str, None] = {}
        for test in ids:
            path, *names = test.partition("[")[0].split("::")
            self.files[path] = None
            for count in range(1, len(names) + 1):
                self._nodes.add("::".join((path, *names[:count])))
        self._paths: set[Path] = set()
        for name in self.files:
            self._paths.update((path := Path(self._root, name), *path.parents))
        self._state: dict[str, dict[str, Any]] = {}

    def _tell(self, record: dict[str, Any]) -> None:
        data = json.dumps(record).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

    # -- collection: nothing but what was asked for

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        vars(config.option).setdefault("verbose", 0)  # the terminal plugin's; conftests read it

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return None if collection_path in self._paths else True

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> list | None:
        return None if f"{collector.nodeid}::{name}" in self._nodes else []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._wanted]

    def pytest_exception_interact(
        self, node: pytest.Item | pytest.Collector, call: pytest.CallInfo
    ) -> None:
        if isinstance(node, pytest.Collector) and call.excinfo is not None:
            error = call.excinfo.value
            if isinstance(error, pytest.Collector.CollectError) and error.__cause__ is not None:
                error = error.__cause__
            self._tell({"collector": node.nodeid, **self._describe(error)})

    # -- the tests themselves

    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo
    ) -> pytest.TestReport | None:
        """A failure's report without pytest's long rendering of it, which is most of its cost."""
        if call.excinfo is None or isinstance(
            call.excinfo.value, (pytest.skip.Exception, pytest.exit.Exception)
        ):
            return None
        details = self._describe(call.excinfo.value)
        report = pytest.TestReport(
            item.nodeid, item.location, {}, "failed", details["error"], call.when
        )
        report.details = details
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if type(report) is not pytest.TestReport:
            return  # a subtest; its test fails with it
        state = self._state.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed"})
        if report.failed and state["outcome"] in ("passed", "skipped"):
            state["outcome"] = "failed" if report.when == "call" else "error"
            details = getattr(report, "details", None)
            state.update(details or {"error": str(report.longrepr).partition("\n")[0][:MAX_TEXT]})
        elif report.skipped and state["outcome"] == "passed":
            state["outcome"] = "skipped"
        if report.when == "teardown":
            self._tell(self._state.pop(report.nodeid))

    def _describe(self, error: BaseException) -> dict[str, Any]:
        frames = list(self._frames(error.__traceback__))
        if len(frames) > MAX_FRAMES:  # runaway recursion: how it began and where it ended
            frames = frames[: MAX_FRAMES // 2] + frames[-MAX_FRAMES // 2 :]
        return {"error": error_line(error), "frames": frames}

    def _frames(self, trace: TracebackType | None) -> Iterable[list]:
        root = self._root + os.sep
        while trace is not None:
            code, names = trace.tb_frame.f_code, trace.tb_frame.f_globals
            # a module compiled elsewhere keeps that place in its code, not in its __file__
            for path in (code.co_filename, names.get("__file__")):
                if isinstance(path, str) and path.startswith(root):
                    text = linecache.getline(path, trace.tb_lineno).strip()[:MAX_TEXT]
                    yield [path[len(root) :], trace.tb_lineno, code.co_qualname, text]
                    break
            trace = trace.tb_next


def error_line(error: BaseException) -> str:
    """`Type: message`, the first line of it: what a reader looks for at the end of a traceback."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    try:
        text = str(error).partition("\n")[0]
    except Exception:
        text = "<unprintable>"
    return f"{name}: {text}"[:MAX_TEXT] if text else name
