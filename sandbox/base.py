"""What a sandbox is: a leased copy of a source tree in which commands and tests run, contained.

The harness talks to every backend through `Sandbox`. Whatever untrusted code does, a call comes
back by its deadline with a result that says what happened; only trouble of the harness raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from sandbox.treefiles import SandboxError as SandboxError

KilledBy = Literal["deadline", "memory", "output", "processes"]
Outcome = Literal["passed", "failed", "error", "skipped", "missing"]


class SandboxBroken(RuntimeError):
    """The sandbox itself failed (it could not be started, or did not come back): harness trouble,
    never the doing of the code under test alone."""


@dataclass(frozen=True)
class Limits:
    """What one request may use, enforced inside and outside the sandbox.

    Attributes:
      memory_mib: address space of one process, and resident memory of all of them together,
        files in the sandbox's own temporary folders included.
      processes: processes and threads at one time.
      wall_s: seconds until everything the request started is killed.
      output_bytes: standard output and error together; more ends the command.
      file_mib: size of any one file.
    """

    memory_mib: int = 1024
    processes: int = 64
    wall_s: float = 20.0
    output_bytes: int = 65536
    file_mib: int = 64


@dataclass(frozen=True)
class ExecResult:
    """One command's end. `exit_code` is -N when signal N ended it (as `subprocess` has it)."""

    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool
    killed_by: KilledBy | None
    seconds: float


@dataclass(frozen=True)
class Frame:
    """One frame of a traceback: `path` relative to the tree, `line` 1-based."""

    path: str
    line: int
    function: str
    source_line: str


@dataclass(frozen=True)
class TestCase:
    """One test's outcome; `error` is the last line of its exception, `frames` the calls that lead
    to it, outermost first, those inside the tree only."""

    __test__ = False  # not a test class of our own suite

    id: str
    outcome: Outcome
    error: str = ""
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class TestReport:
    """A test run: one case for every id asked for, in that order, `missing` where none was seen.

    `exit_code` is pytest's (0 all passed, 1 some failed, …), or -N when signal N ended it. `tail`
    is the end of the output, at most 2,000 characters, for errors outside any test. `seconds` are
    of wall time; `cpu_s` is the CPU time of the run's process and of those it waited for.
    """

    __test__ = False

    cases: tuple[TestCase, ...]
    exit_code: int
    timed_out: bool
    killed_by: KilledBy | None
    seconds: float
    tail: str
    cpu_s: float = 0.0

    def passed(self, ids: Iterable[str]) -> bool:
        """Whether the run ended by itself and every one of `ids` was run and passed."""
        good = {case.id for case in self.cases if case.outcome == "passed"}
        return not self.timed_out and self.killed_by is None and good.issuperset(ids)


@dataclass(frozen=True)
class Tree:
    """A state of a source tree: the files below `root`, with those of `overlay` put over them.

    `root` must not change while a pool uses it. `overlay` maps paths relative to `root` to whole
    contents, or to None where no file shall be. `python_path` holds folders, relative to `root`,
    that tests find first on `sys.path`.
    """

    root: Path
    overlay: Mapping[str, bytes | None] = field(default_factory=dict)
    python_path: tuple[str, ...] = (".",)


class Sandbox(Protocol):
    """A leased tree. One call at a time; further calls wait. Raises `SandboxError` for what the
    caller should not have asked, `SandboxBroken` for trouble of the harness."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float | None = None, stdin: bytes = b""
    ) -> ExecResult:
        """Run a command in the tree's root; everything it started is gone when this returns."""
        ...

    async def run_tests(
        self,
        ids: Sequence[str],
        *,
        timeout_s: float | None = None,
        shuffle: int | None = None,
        cpu_s: float | None = None,
    ) -> TestReport:
        """Run these pytest ids (relative to the tree's root), in one process, in file order; or,
        with a seed to `shuffle` by, in a random order across files. A process that has used `cpu_s`
        seconds of CPU time ends there (SIGPROF): of a loop without end, that tells sooner than
        wall time, and the same on a busy machine."""
        ...

    async def read(self, path: str) -> bytes:
        """The contents of a regular file of the tree."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Replace or create a file of the tree; missing folders are made."""
        ...

    async def diff(self) -> str:
        """Unified diff from the leased tree to the present one; text files only, no caches."""
        ...

    async def reset(self, tree: Tree) -> None:
        """Make the workspace equal to `tree`; later diffs are against it."""
        ...

    async def close(self) -> None:
        """Give the sandbox back."""
        ...


class SandboxPool(Protocol):
    """Sandboxes to be leased, wherever they are. An async context manager that closes it.

    backend: the kind of sandbox, once that is known.
    """

    backend: str
    limits: Limits

    @property
    def environment(self) -> str:
        """SHA-256 of what sandboxes find installed; "" where that is not known yet."""
        ...

    def lease(self, tree: Tree) -> AbstractAsyncContextManager[Sandbox]:
        """A sandbox that holds `tree`; raises SandboxBroken, and in its body too, for trouble that
        is the harness's: the same work may well succeed in another lease."""
        ...

    def metrics(self) -> dict[str, Any]:
        """How the pool does; {} where there is nothing to tell."""
        ...

    async def close(self) -> None:
        """End every sandbox and leave nothing behind."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...
