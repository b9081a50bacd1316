"""QuixBugs: small programs with one bug each, tests, and the same programs put right.

All tasks share one tree: every program put right, the tests, and their data. The bug of each is its
own program as it was. Which tests tell is found out by running them.
https://github.com/jkoppel/QuixBugs
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from configs.errors import InputError
from sandbox.base import Sandbox, SandboxPool, Tree
from sandbox.coverage import coverage
from sandbox.importers.carried import carry, head, is_repository, licence_of, read_folder
from sandbox.importers.rows import changed_function
from sandbox.packages import Package
from sandbox.patch import make_patch
from sandbox.prove import prove
from sandbox.shipped import instruction
from sandbox.task import ALWAYS_PROTECTED, Task

FORMAT = "quixbugs"
SPLIT = "heldout"
BUGGY, RIGHT, TESTS, DATA = (
    "python_programs", "correct_python_programs", "python_testcases", "json_testcases",
)  # fmt: skip
PYTHON_PATH = (".", TESTS)
MAX_FAIL_TO_PASS = 6  # a test of an endless loop takes its whole limit
DEADLINE_S = 20.0

# In the place of QuixBugs' own: its options are no longer read where a session is made ready before
# the tree is known. Many of the bugs are loops without end.
CONFTEST = """\
import signal

import pytest

pytest.use_correct = False
pytest.run_slow = False

LIMIT_S = 1.0


def _stop(*_):
    raise TimeoutError(f"the test took more than {LIMIT_S} s")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
"""


def recognizes(source: Path) -> bool:
    return (source / BUGGY).is_dir() and (source / RIGHT).is_dir() and (source / TESTS).is_dir()


class QuixBugs:
    """A checkout, read. Raises InputError when it is none."""

    def __init__(self, source: Path) -> None:
        if not recognizes(source):
            raise InputError(f"{source}: no folders {BUGGY}, {RIGHT} and {TESTS}: not QuixBugs")
        buggy, right = (read_folder(source / name) for name in (BUGGY, RIGHT))
        tests = read_folder(source / TESTS)
        self.programs = sorted(
            path.removesuffix(".py")
            for path in buggy
            if path.endswith(".py") and f"test_{path}" in tests
        )
        if not self.programs:
            raise InputError(f"{source}: no program in {BUGGY} has a test_NAME.py in {TESTS}")
        self.buggy = {name: buggy[f"{name}.py"] for name in self.programs}
        # programs that lack a right version stay as they are: their tests will tell
        self.right = {n: right[f"{n}.py"] for n in self.programs if f"{n}.py" in right}
        helpers = {p: d for p, d in buggy.items() if not p.endswith("_test.py")}
        fixed = {f"{n}.py": with_words(self.right[n], self.buggy[n]) for n in self.right}
        self.files = {f"{BUGGY}/{path}": data for path, data in (helpers | fixed).items()}
        self.files |= {f"{TESTS}/{path}": data for path, data in tests.items()}
        if (source / DATA).is_dir():
            data = read_folder(source / DATA)
            self.files |= {f"{DATA}/{path}": text for path, text in data.items()}
        top = {p.name: p.read_bytes() for p in sorted(source.glob("LICEN[CS]E*")) if p.is_file()}
        self.files |= top
        self.files["conftest.py"] = CONFTEST.encode()
        self.origin = [f"format={FORMAT}", "repo=jkoppel/QuixBugs"]
        if is_repository(source):
            with contextlib.suppress(InputError):  # no git here, or no commit there
                self.origin.append(f"commit={head(source)}")
        release = carry("quixbugs", "tree", self.files)
        self.package = Package(
            release.name,
            release.version,
            release.sha256,
            carried=True,
            licence=licence_of(self.files),
            split=SPLIT,
            source=(BUGGY,),
            tests=(TESTS,),
            python_path=PYTHON_PATH,
        )

    async def tasks(self, pool: SandboxPool, split: str) -> AsyncIterator[tuple[str, Task | str]]:
        """Each program's name, with its task, or why there is none."""
        measured = await coverage(self.package, pool.backend)
        async with pool.lease(Tree(self.package.tree, {}, PYTHON_PATH)) as sandbox:
            for name in self.programs:
                tests = [
                    id for id in measured.seconds if id.startswith(f"{TESTS}/test_{name}.py::")
                ]
                try:
                    yield name, await self._task(name, tests, sandbox, split)
                except InputError as error:
                    yield name, str(error)

    async def _task(self, name: str, tests: list[str], sandbox: Sandbox, split: str) -> Task:
        if name not in self.right:
            raise InputError(f"{RIGHT} has no {name}.py")
        if not tests:
            raise InputError("none of its tests passes on the right version")
        module = f"{BUGGY}/{name}.py"
        fixed = Tree(self.package.tree, {}, PYTHON_PATH)
        buggy = Tree(self.package.tree, {module: self.buggy[name]}, PYTHON_PATH)
        await sandbox.reset(buggy)
        seen: dict[str, bool] = {}
        for test in tests:  # one by one: an endless loop must not hide the others
            if sum(not good for good in seen.values()) < MAX_FAIL_TO_PASS:
                report = await sandbox.run_tests([test], timeout_s=DEADLINE_S)
                seen[test] = report.passed([test])
        failing = [test for test, good in seen.items() if not good]
        passing = [test for test, good in seen.items() if good]
        proof = await prove(sandbox, buggy, fixed, failing, passing, repeat=1)
        if not proof.fail_to_pass:
            raise InputError(f"no test tells bug from fix: {proof.dropped or 'all pass with both'}")
        function = changed_function(self.buggy[name], self.files[module])
        fail_to_pass = tuple(proof.fail_to_pass)
        return Task(
            name=f"quixbugs-{name}",
            source="imported",
            split=split,
            package=self.package.name,
            version=self.package.version,
            sdist_sha256=self.package.sha256,
            licence=self.package.licence,
            module=module,
            function=function,
            operator="fix",
            instruction=instruction(module, function, fail_to_pass),
            fail_to_pass=fail_to_pass,
            pass_to_pass=tuple(proof.pass_to_pass),
            python_path=PYTHON_PATH,
            bug_patch=make_patch({module: self.files[module]}, {module: self.buggy[name]}),
            protected=(f"{TESTS}/*", f"{DATA}/*", *ALWAYS_PROTECTED),
            origin="carried",
            provenance=(*self.origin, f"instance_id={name}"),
        )


def with_words(right: bytes, buggy: bytes) -> bytes:
    """The right program with the words that follow the buggy one: what it should do."""
    code, mark, words = buggy.partition(b'\n"""')
    if not mark or b'\n"""' in right:
        return right
    space = code[len(code.rstrip()) :]
    return right.rstrip() + space + mark + words
