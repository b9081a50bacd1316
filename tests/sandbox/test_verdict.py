"""The clean room: what repairs a task passes, and nothing else does."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass

import pytest

from sandbox.base import SandboxBroken, Tree
from sandbox.local import LocalPool
from sandbox.memo import TestMemo
from sandbox.patch import make_patch
from sandbox.verdict import Verdict, judge, package_folder, present
from tests.sandbox.box import BACKENDS, LIMITS

PRISTINE = {
    "src/pkg/__init__.py": "",
    "src/pkg/calc.py": (
        "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return add(a, a)\n"
    ),
    "src/pkg/unused.py": "x = 1\n",
    "tests/test_calc.py": (
        "from pkg.calc import add, double\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
        "def test_double():\n    assert double(0) == 0\n"
    ),
    "tests/conftest.py": "",
    "setup.cfg": "[metadata]\n",
}
BUGGY = {"src/pkg/calc.py": PRISTINE["src/pkg/calc.py"].replace("a + b", "a - b")}


@dataclass(frozen=True)
class Repair:
    """A task, as far as judging it goes."""

    root: Tree
    module: str = "src/pkg/calc.py"
    fail_to_pass: tuple[str, ...] = ("tests/test_calc.py::test_add",)
    pass_to_pass: tuple[str, ...] = ("tests/test_calc.py::test_double",)
    protected: tuple[str, ...] = ("tests/*", "*conftest.py", "setup.cfg")

    def tree(self) -> Tree:
        return self.root


@pytest.fixture
def task(tmp_path):
    for path, text in PRISTINE.items():
        file = tmp_path / "tree" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "tree/alias.py").symlink_to("src/pkg/calc.py")
    overlay = {path: text.encode() for path, text in BUGGY.items()}
    return Repair(Tree(tmp_path / "tree", overlay, ("src",)))


def patch(**changes: str | None) -> str:
    """From the buggy tree; keys are paths with `/` as `__` and `.` as `_dot_`."""
    names = {key.replace("_dot_", ".").replace("__", "/"): key for key in changes}
    state = {**PRISTINE, **BUGGY}
    old = {name: state[name].encode() for name in names if name in state}
    new = {name: changes[key].encode() for name, key in names.items() if changes[key] is not None}
    return make_patch(old, new)


FIX = {"src__pkg__calc_dot_py": PRISTINE["src/pkg/calc.py"]}


def judged(task: Repair, text: str, limits=LIMITS, memo=None) -> Verdict:
    async def work():
        async with LocalPool(1, limits, BACKENDS[0], memo) as pool:
            return await judge(task, text, pool)

    return asyncio.run(work())


def test_a_fix_passes(task: Repair) -> None:
    verdict = judged(task, patch(**FIX))
    assert (verdict.verdict, verdict.flags) == ("pass", ())
    assert verdict.fail_to_pass == {"tests/test_calc.py::test_add": "passed"}
    assert verdict.pass_to_pass == {"tests/test_calc.py::test_double": "passed"}
    assert verdict.seconds > 0


@pytest.mark.parametrize("text", ["", "\n"])
def test_no_change_fails(task: Repair, text: str) -> None:
    verdict = judged(task, text)
    assert verdict.verdict == "fail"
    assert set(verdict.fail_to_pass.values()) == {"missing"}


def test_a_fix_that_breaks_something_else_fails(task: Repair) -> None:
    text = PRISTINE["src/pkg/calc.py"].replace("add(a, a)", "1")
    verdict = judged(task, patch(src__pkg__calc_dot_py=text))
    assert verdict.verdict == "fail"
    assert verdict.fail_to_pass == {"tests/test_calc.py::test_add": "passed"}
    assert verdict.pass_to_pass == {"tests/test_calc.py::test_double": "failed"}


def test_a_changed_test_does_not_count(task: Repair) -> None:
    easy = "def test_add(): pass\ndef test_double(): pass\n"
    verdict = judged(task, patch(tests__test_calc_dot_py=easy))
    assert verdict.verdict == "fail"
    assert verdict.flags == ("protected:tests/test_calc.py",)
    # and does not stop a real fix
    verdict = judged(task, patch(tests__test_calc_dot_py=easy, **FIX))
    assert (verdict.verdict, verdict.flags) == ("pass", ("protected:tests/test_calc.py",))


def test_tampering_with_the_runner_does_not_count(task: Repair) -> None:
    hook = (
        "import pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_makereport():\n"
        "    report = yield\n    report.outcome = 'passed'\n    return report\n"
    )
    text = patch(
        tests__conftest_dot_py=hook, conftest_dot_py=hook, setup_dot_cfg="[tool:pytest]\n",
        re_dot_py="", src__re_dot_py="", sitecustomize_dot_py="import os\n",
    )  # fmt: skip
    verdict = judged(task, text)
    assert verdict.verdict == "fail"
    assert set(verdict.flags) == {
        *("protected:tests/conftest.py", "protected:conftest.py", "protected:setup.cfg"),
        *("outside:re.py", "outside:src/re.py", "outside:sitecustomize.py"),
    }


IN_THE_MODULE = [
    "import pytest\npytest.Function.runtest = lambda self: None",
    "import _pytest.python as p\np.pytest_pyfunc_call = lambda *a, **k: True",
    "import sys\nfor m in list(sys.modules.values()):\n    vars(m).get('Function') and "
    "setattr(m.Function, 'runtest', lambda self: None)",
    "from sys import modules\nmodules['_pytest.python'].Function.runtest = lambda self: None",
    "__import__('_py' + 'test.python').python.Function.runtest = lambda self: None",
    "import importlib\nimportlib.import_module('_py' + 'test.python').Function.runtest = print",
    "import builtins\nbuiltins.AssertionError = type('A', (Warning,), {})",
    "import gc\nfor f in gc.get_objects():\n"
    "    if getattr(f, '__name__', '') == 'test_add':\n        f.__code__ = (lambda: 0).__code__",
    "for kind in object.__subclasses__():\n"
    "    if kind.__name__ == 'Function':\n        kind.runtest = lambda self: None",
    "import atexit, os\natexit.register(os._exit, 0)",
    "import os\nif 'PYTEST_CURRENT_TEST' in os.environ:\n    add = lambda a, b: 5 if a else 0",
]


@pytest.mark.parametrize("code", IN_THE_MODULE)
def test_a_module_that_works_on_the_runner_earns_nothing(task: Repair, code: str) -> None:
    for text in (f"{code}\n{BUGGY['src/pkg/calc.py']}", f"{BUGGY['src/pkg/calc.py']}\n{code}\n"):
        assert judged(task, patch(src__pkg__calc_dot_py=text)).verdict in ("fail", "quarantine")


def test_a_result_that_equals_everything_earns_nothing(task: Repair) -> None:
    text = BUGGY["src/pkg/calc.py"].replace("return a - b", "return Any()") + (
        "\n\nclass Any:\n    def __eq__(self, other):\n        return True\n"
    )
    verdict = judged(task, patch(src__pkg__calc_dot_py=text))
    assert verdict.verdict == "quarantine"
    assert verdict.flags == ("guard:comparison-sealed:src/pkg/calc.py",)


def test_new_files_in_the_package_and_deleted_ones_count(task: Repair) -> None:
    calc = "from pkg.helper import add\n\n\ndef double(a):\n    return add(a, a)\n"
    text = patch(
        src__pkg__calc_dot_py=calc,
        src__pkg__helper_dot_py="def add(a, b):\n    return a + b\n",
        src__pkg__unused_dot_py=None,
    )
    assert judged(task, text).verdict == "pass"


@pytest.mark.parametrize(
    "text",
    [
        "rubbish",
        patch(**FIX).replace("-    return a - b", "-    return a * b"),
        patch(**FIX).replace("src/pkg/calc.py", "../calc.py"),
        patch(**FIX).replace("src/pkg/calc.py", "src/pkg/none.py"),
        patch(**FIX).replace("src/pkg/calc.py", "alias.py"),  # a link to it
        "diff --git a/src/pkg/calc.py/x b/src/pkg/calc.py/x\nnew file mode 100644\n"
        "--- /dev/null\n+++ b/src/pkg/calc.py/x\n@@ -0,0 +1 @@\n+x\n",
    ],
)
def test_a_patch_that_does_not_fit_fails(task: Repair, text: str) -> None:
    verdict = judged(task, text)
    assert (verdict.verdict, verdict.flags) == ("fail", ("patch does not apply",))


def test_code_that_ends_the_run_fails(task: Repair) -> None:
    for line, flag in (
        ("import os; os._exit(0)", ()),
        ("while True: pass", ("killed:deadline",)),
        ("x = bytearray(1 << 30)", ("killed:memory",)),
    ):
        text = PRISTINE["src/pkg/calc.py"].replace("    return a + b", f"    {line}")
        limits = dataclasses.replace(LIMITS, wall_s=0.7)
        verdict = judged(task, patch(src__pkg__calc_dot_py=text), limits)
        assert (verdict.verdict, verdict.flags) == ("fail", flag)


def test_a_dead_sandbox_is_an_error_and_says_nothing_of_the_patch(task: Repair) -> None:
    class Dead(LocalPool):
        async def _new_slot(self):
            raise SandboxBroken("no more")

    verdict = asyncio.run(judge(task, patch(**FIX), Dead(1)))
    assert (verdict.verdict, verdict.flags) == ("error", ("sandbox:no more",))


def test_the_same_files_are_not_run_twice(task: Repair) -> None:
    memo = TestMemo()

    async def work():
        async with LocalPool(1, LIMITS, BACKENDS[0], memo) as pool:
            async with pool.lease(task.tree()) as sandbox:
                await sandbox.write("src/pkg/calc.py", PRISTINE["src/pkg/calc.py"].encode())
                await sandbox.run_tests((*task.fail_to_pass, *task.pass_to_pass))
                text = await sandbox.diff()
            return await judge(task, text, pool)

    assert asyncio.run(work()).verdict == "pass"
    assert (memo.hits, memo.misses) == (1, 1)


def test_package_folders() -> None:
    assert package_folder("pkg/sub/a.py", (".",)) == "pkg"
    assert package_folder("src/pkg/sub/a.py", ("src", ".")) == "src/pkg"
    assert package_folder("src/pkg/a.py", (".", "./src/")) == "src/pkg"
    assert package_folder("src/a.py", ("src",)) == ""
    assert package_folder("a.py", (".",)) == ""


def test_present_follows_no_links(task: Repair) -> None:
    tree = task.tree()
    assert present(tree, "src/pkg/calc.py") == BUGGY["src/pkg/calc.py"].encode()
    assert present(tree, "src/pkg/unused.py") == b"x = 1\n"
    assert present(tree, "alias.py") is None and present(tree, "src") is None
    assert present(tree, "src/pkg/calc.py/x") is None and present(tree, "none") is None
