"""Pytest inside the sandbox: a session made ready once, then forked for every test run.

Runs in the runner, imports the standard library and pytest only. Most of what `pytest` does on a
small run is to make itself ready: to load plugins, read options, gather fixtures. So the runner
starts a session on no tests at all, and serves requests from inside it, at the end of its start
(`pytest_sessionstart`). A forked child returns from there: pytest goes on in it, and finds tests.

Tests under repair run the way `pytest` runs them, less its reporting: no terminal, no cache, no
settings of the tree (`conftest.py` files count), and only the tests asked for are ever created.
What became of each is told, in JSON lines, on a descriptor.
"""

from __future__ import annotations

import compileall
import importlib
import json
import linecache
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, cast

import pytest

MAX_FRAMES = 30
MAX_TEXT = 2000

# what costs time and gives the tests nothing
_WITHOUT = (
    *("terminal", "cacheprovider", "junitxml", "pastebin", "doctest", "faulthandler", "stepwise"),
    *("setuponly", "setupplan", "debugging", "threadexception", "unraisableexception"),
)
# read by other plugins and by conftest files, and set by none that is left
_OPTIONS = (("verbose", 0), ("trace", False), ("usepdb", False))

# what many tests import
_AHEAD = ("asyncio", "decimal", "fractions", "subprocess", "unittest", "unittest.mock")


class Begin(BaseException):
    """Raised in a child: run these tests, or only collect them, and tell it on `report_fd`.

    With `in_order` they run in the order of `ids`; else in that of files, as pytest has it."""

    def __init__(
        self, ids: Sequence[str], report_fd: int, collect_only: bool, in_order: bool
    ) -> None:
        super().__init__()
        self.ids, self.report_fd, self.collect_only = ids, report_fd, collect_only
        self.in_order = in_order


def serve_from_pytest(serve: Callable[[], None], workspace: str, nowhere: str) -> NoReturn:
    """Make a session ready, call `serve` in it, and end the process when that returns.

    `serve` may fork; where it raises `Begin`, tests are run, and then that process ends. `nowhere`
    is a folder without tests: pytest would look for some, and for conftest files, by itself.
    """
    os.chdir(workspace)
    plugin = _Plugin(serve)
    arguments = ["-c", os.devnull, "--rootdir", workspace, "--confcutdir", workspace]
    # with --pyargs a conftest file that comes late, as all will, may name plugins
    arguments += ["--continue-on-collection-errors", "--pyargs", nowhere]
    code = pytest.main([*(f"-pno:{name}" for name in _WITHOUT), *arguments], plugins=[plugin])
    if plugin.reporter is None:
        sys.exit(f"pytest does not start: exit code {int(code)}")
    plugin.reporter.finish()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))  # no handlers of the tree's own at exit


class _Plugin:
    """Stands where runner and tests part."""

    def __init__(self, serve: Callable[[], None]) -> None:
        self._serve = serve
        self.reporter: _Reporter | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        for name, value in _OPTIONS:
            vars(config.option).setdefault(name, value)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        config = session.config
        capture: Any = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # into files that children would share
        needed = set(sys.modules)
        for name in _AHEAD:
            importlib.import_module(name)
        try:
            self._serve()
        except Begin as begin:
            self.reporter = _Reporter(begin.ids, begin.report_fd, begin.in_order)
            self.reporter.forget_shadowed(sys.modules.keys() - needed)
            config.args = self.reporter.existing_files()
            config.option.pyargs = False
            config.option.collectonly = begin.collect_only
            if begin.collect_only:
                sys.dont_write_bytecode = False
                compileall.compile_dir(".", quiet=2)
            else:
                config.pluginmanager.register(self.reporter)
            capture.start_global_capturing()
            capture.suspend_global_capture()
            return
        os._exit(0)


class _Reporter:
    """A pytest plugin: lets only the wanted tests come into being, and reports how they went."""

    def __init__(self, ids: Sequence[str], report_fd: int, in_order: bool) -> None:
        self._fd = report_fd
        self._order = {id: place for place, id in enumerate(ids)} if in_order else {}
        self._root = os.getcwd()
        self._wanted = set(ids)
        # tests/test_a.py::Class::test[x] wants the nodes tests/test_a.py::Class and …::test
        self._nodes: set[str] = set()
        self._files: dict[str, None] = {}
        for test in ids:
            file, *names = test.partition("[")[0].split("::")
            self._files[file] = None
            for count in range(1, len(names) + 1):
                self._nodes.add("::".join((file, *names[:count])))
        self._paths: set[Path] = set()
        for file in self._files:
            self._paths.update((path := Path(self._root, file), *path.parents))
        self._state: dict[str, dict[str, Any]] = {}
        self._modules_before = set(sys.modules)

    def existing_files(self) -> list[str]:
        """The files of the wanted tests, less those that are not there (pytest would stop)."""
        for file in self._files:
            if not os.path.isfile(file):
                print(f"no such test file: {file}", file=sys.stderr)
        return [file for file in self._files if os.path.isfile(file)]

    def forget_shadowed(self, ahead: set[str]) -> None:
        """Of modules imported `ahead`, forget those that the tree has its own of."""
        folders = {path for path in self._paths if path.is_relative_to(self._root)}
        names: set[str] = set()
        for folder in {*map(str, folders), *sys.path}:
            if os.path.isdir(folder) and folder.startswith(self._root):
                names.update(name.partition(".")[0] for name in os.listdir(folder))
        for module in ahead:
            if module.partition(".")[0] in names:
                del sys.modules[module]
        self._modules_before -= ahead

    def finish(self) -> None:
        """Tell which modules were imported that the runner might import ahead of the next run."""
        ahead = [
            name
            for name, module in list(sys.modules.items())
            if name not in self._modules_before
            and name.partition(".")[0] in sys.stdlib_module_names
            and not str(getattr(module, "__file__", "")).startswith(self._root)
        ]
        self._tell({"ahead": ahead[:200]})

    def _tell(self, record: dict[str, Any]) -> None:
        data = json.dumps(record).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

    # -- collection: nothing but what was asked for

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return None if collection_path in self._paths else True

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> list | None:
        return None if f"{collector.nodeid}::{name}" in self._nodes else []

    @pytest.hookimpl(trylast=True)  # after pytest's own reordering by fixtures
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._wanted]
        if self._order:
            items.sort(key=lambda item: self._order[item.nodeid])

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
        when = cast(Literal["setup", "call", "teardown"], call.when)
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", "", when)
        vars(report)["details"] = details
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        subtest = type(report) is not pytest.TestReport  # it fails its test, and does no more
        state = self._state.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed"})
        if report.failed and state["outcome"] in ("passed", "skipped"):
            state["outcome"] = "failed" if report.when == "call" else "error"
            details = getattr(report, "details", None)
            state.update(details or {"error": str(report.longrepr).partition("\n")[0][:MAX_TEXT]})
        elif report.skipped and state["outcome"] == "passed" and not subtest:
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
