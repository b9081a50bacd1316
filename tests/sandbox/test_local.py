"""The sandbox's contract, on every backend that works here."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import InputError
from sandbox.base import Frame, SandboxBroken, SandboxError, Tree
from sandbox.local import PREFIX, LocalPool, prebuild, sweep
from sandbox.memo import TestMemo, memo_key
from sandbox.patch import apply_patch
from tests.sandbox.box import BACKENDS, DOCKER, LIMITS, MODULE, Box, make_tree

MODULE_TESTS = "tests/test_mod.py::"


@pytest.fixture(scope="module", params=[*BACKENDS, *DOCKER])
def box(request):
    box = Box(request.param)
    yield box
    box.close()


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


def outcomes(report) -> dict[str, str]:
    return {case.id.removeprefix(MODULE_TESTS): case.outcome for case in report.cases}


def ids(*names: str) -> list[str]:
    return [MODULE_TESTS + name for name in names]


# -- tests


EXPECTED = {
    "test_add": "passed",
    "test_wrong": "failed",
    "test_deep": "failed",
    "test_many[1]": "passed",
    "test_many[2]": "failed",
    "test_many[a::b[c]]": "passed",
    "test_setup": "error",
    "test_from_conftest": "passed",
    "test_skip": "skipped",
    "test_expected": "skipped",
    "TestGroup::test_in": "passed",
    "TestOld::test_unit": "passed",
    "TestOld::test_unit_wrong": "failed",
    "TestOld::test_unit_parts": "failed",
    "TestOld::test_unit_skip": "skipped",
    "TestOld::test_unit_expected": "skipped",
    "test_parts": "failed",
    "test_teardown": "error",
    "test_none": "missing",
}


def test_outcomes_errors_and_frames(box: Box, tree: Tree) -> None:
    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(ids(*EXPECTED))

    report = box.run(work())
    assert outcomes(report) == EXPECTED
    assert (report.exit_code, report.killed_by, report.timed_out) == (1, None, False)
    cases = {case.id.removeprefix(MODULE_TESTS): case for case in report.cases}
    assert cases["test_wrong"].error.startswith("AssertionError: assert 2 == 3")
    assert cases["test_setup"].error == "OSError: no fixture"
    deep = cases["test_deep"]
    assert deep.error == "KeyError: 7"
    assert deep.frames == (
        Frame("tests/test_mod.py", 18, "test_deep", "mod.boom(7)"),
        Frame("src/mod.py", 9, "boom", "raise KeyError(n)"),
    )
    assert report.passed(ids("test_add", "test_many[1]"))
    assert not report.passed(ids("test_add", "test_skip"))
    assert not report.passed(ids("test_none"))


def test_agrees_with_pytest_itself(box: Box, tree: Tree) -> None:
    """The same tests under the `pytest` command, in a process of its own."""
    (tree.root / "pytest.ini").unlink()
    env = {
        "PYTHONPATH": os.pathsep.join(["src", *sys.path]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "tests"],
        cwd=tree.root, capture_output=True, text=True, env=env,
    )  # fmt: skip
    names = {"PASSED": "passed", "FAILED": "failed", "ERROR": "error", "XFAIL": "skipped"}
    expected = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.removeprefix("SUB").replace("(n=1)", "").partition(" ")
        if word in names:
            expected[rest.partition(" - ")[0].removeprefix(MODULE_TESTS)] = names[word]
    assert len(expected) == len(EXPECTED) - 3  # skips have no id there, and one does not exist

    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(ids(*expected))

    assert outcomes(box.run(work())) == expected


def test_a_file_that_does_not_import_fails_its_tests_only(box: Box, tree: Tree) -> None:
    overlay = {
        "tests/test_syntax.py": b"def test_a(:\n",
        "tests/test_import.py": b"import mod\nimport nonesuch\n",
        "src/mod.py": MODULE.encode(),
    }
    tree = dataclasses.replace(tree, overlay=overlay)
    asked = ["tests/test_syntax.py::test_a", "tests/test_import.py::test_b", *ids("test_add")]
    asked += ["tests/test_gone.py::test_c"]

    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(asked)

    report = box.run(work())
    assert [case.outcome for case in report.cases] == ["error", "error", "passed", "missing"]
    assert report.cases[0].error.startswith("SyntaxError: ")
    assert report.cases[1].error == "ModuleNotFoundError: No module named 'nonesuch'"
    assert report.cases[1].frames[-1].source_line == "import nonesuch"
    assert "tests/test_gone.py" in report.tail


def test_tests_leave_no_trace(box: Box, tree: Tree) -> None:
    messy = (
        "import os, pathlib, tempfile\n"
        "def test_mess():\n"
        "    assert not os.path.exists('made'), 'seen before'\n"
        "    os.makedirs('made/deep')\n"
        "    pathlib.Path('made/deep/file').write_text('x')\n"
        "    pathlib.Path('src/mod.py').write_text('broken(')\n"
        "    os.remove('tests/conftest.py')\n"
        "    os.chmod('src', 0)\n"
        "    flag = pathlib.Path(tempfile.gettempdir(), 'flag')\n"
        "    assert not flag.exists()\n"
        "    flag.write_text('x')\n"
    )
    tree = dataclasses.replace(tree, overlay={"tests/test_mess.py": messy.encode()})
    mess = ["tests/test_mess.py::test_mess"]

    async def work():
        async with box.pool.lease(tree) as sandbox:
            for _ in range(2):
                report = await sandbox.run_tests(mess)
                assert report.passed(mess), report
                assert (await sandbox.run_tests(ids("test_add"))).passed(ids("test_add"))
            return await sandbox.diff(), (await sandbox.exec(["ls", "-a"])).stdout.split()

    diff, listing = box.run(work())
    assert diff == ""
    assert sorted(listing) == sorted([".", "..", "data.bin", "link", "pytest.ini", "src", "tests"])


def test_output_of_tests_ends_up_in_the_tail(box: Box, tree: Tree) -> None:
    conftest = b"import sys\nsys.exit('conftest gave up')\n"
    tree = dataclasses.replace(tree, overlay={"tests/conftest.py": conftest})

    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(ids("test_add"))

    report = box.run(work())
    assert not report.passed(ids("test_add"))
    assert "conftest gave up" in report.tail


CONFTEST = """
import pytest

pytest_plugins = ["extra"]
seen = []


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=False)
    parser.addini("flavour", "a setting", default="plain")


def pytest_configure(config):
    seen.append("configured")
    config.addinivalue_line("markers", "odd: a mark")


@pytest.fixture(autouse=True, scope="session")
def settings(request):
    return request.config.getoption("--slow"), request.config.getini("flavour"), seen
"""
USES_CONFTEST = """
import sys


def test_settings(settings):
    assert settings == (False, "plain", ["configured"])


def test_plugin(from_plugin):
    assert from_plugin == "extra"


def test_streams(capfd):
    print("out")
    print("err", file=sys.stderr)
    assert capfd.readouterr() == ("out\\n", "err\\n")
    assert sys.stdin.read is not None and sys.argv == ["pytest"]
"""


def test_conftest_files_do_all_they_do_under_pytest(box: Box, tree: Tree) -> None:
    plugin = b"import pytest\n@pytest.fixture\ndef from_plugin(): return __name__"
    overlay = {
        "conftest.py": CONFTEST.encode(),
        "src/extra.py": plugin,
        "tests/sub/test_uses.py": USES_CONFTEST.encode(),
    }
    tree = dataclasses.replace(tree, overlay=overlay)
    asked = [f"tests/sub/test_uses.py::test_{name}" for name in ("settings", "plugin", "streams")]

    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests([*asked, *ids("test_from_conftest")])

    report = box.run(work())
    assert report.exit_code == 0, report


def test_every_run_has_the_same_order_of_sets(box: Box, tree: Tree) -> None:
    fixed = subprocess.run(
        [sys.executable, "-c", "print(hash('a text'))"],
        capture_output=True, text=True, env={"PYTHONHASHSEED": "0"},
    )  # fmt: skip
    source = f"def test(): assert hash('a text') == {int(fixed.stdout)}\n"
    tree = dataclasses.replace(tree, overlay={"tests/test_hash.py": source.encode()})

    async def work():
        async with box.pool.lease(tree) as sandbox:
            told = await sandbox.exec(["python3", "-c", "print(hash('a text'))"])
            assert told.stdout == fixed.stdout
            return await sandbox.run_tests(["tests/test_hash.py::test"])

    assert box.run(work()).exit_code == 0


def test_what_one_run_imported_is_not_there_in_the_next(box: Box, tree: Tree) -> None:
    """Modules of the tree live in a child only, whatever they are called."""
    source = "import sys\nimport {name}\ndef test(): assert {name}.VALUE == {value}\n"
    asked = ["tests/test_own.py::test"]

    async def work():
        for name, value in ("mod2", 1), ("mod2", 2), ("colorsys", 3), ("this", 4), ("colorsys", 5):
            overlay = {
                f"src/{name}.py": f"VALUE = {value}".encode(),
                "tests/test_own.py": source.format(name=name, value=value).encode(),
            }
            async with box.pool.lease(dataclasses.replace(tree, overlay=overlay)) as sandbox:
                report = await sandbox.run_tests(asked)
                assert report.passed(asked), (name, value, report)

    box.run(work())


# -- files


def test_read_write_diff_reset(box: Box, tree: Tree) -> None:
    async def work():
        async with box.pool.lease(tree) as sandbox:
            assert await sandbox.read("src/mod.py") == MODULE.encode()
            await sandbox.write("src/mod.py", MODULE.replace("a + b", "a - b").encode())
            await sandbox.write("new/deep/file.txt", b"fresh")
            await sandbox.write("data.bin", b"\0")  # not text: not told
            diff = await sandbox.diff()
            after = await sandbox.run_tests(ids("test_add"))
            await sandbox.reset(tree)
            assert await sandbox.diff() == ""
            assert (await sandbox.run_tests(ids("test_add"))).passed(ids("test_add"))
            with pytest.raises(SandboxError):
                await sandbox.read("new/deep/file.txt")
            listing = (await sandbox.exec(["ls"])).stdout.split()
            return diff, after, listing

    diff, after, listing = box.run(work())
    assert outcomes(after) == {"test_add": "failed"}
    files = {"src/mod.py": MODULE.encode()}
    assert apply_patch(files, diff) == {
        "new/deep/file.txt": b"fresh",
        "src/mod.py": MODULE.replace("a + b", "a - b").encode(),
    }
    assert "new" not in listing


def test_diff_tells_what_commands_did(box: Box, tree: Tree) -> None:
    async def work():
        async with box.pool.lease(tree) as sandbox:
            script = "rm tests/conftest.py; echo more >> pytest.ini; echo new > a; mkfifo pipe;"
            script += "ln -s /etc/passwd leak; mkdir -p src/__pycache__; echo 1 > src/__pycache__/x"
            assert (await sandbox.exec(["sh", "-c", script])).exit_code == 0
            diff = await sandbox.diff()
            await sandbox.reset(tree)
            return diff, await sandbox.diff(), await sandbox.exec(["ls", "-A"])

    diff, clean, listing = box.run(work())
    assert [line for line in diff.splitlines() if line.startswith("diff")] == [
        "diff --git a/a b/a",
        "diff --git a/pytest.ini b/pytest.ini",
        "diff --git a/tests/conftest.py b/tests/conftest.py",
    ]
    assert clean == ""
    assert listing.stdout.split() == ["data.bin", "link", "pytest.ini", "src", "tests"]


def test_an_overlay_can_add_change_and_remove(box: Box, tree: Tree) -> None:
    changed = dataclasses.replace(
        tree, overlay={"src/mod.py": b"x = 1\n", "src/more.py": b"", "tests/conftest.py": None}
    )

    async def listing(leased):
        async with box.pool.lease(leased) as sandbox:
            module = await sandbox.read("src/mod.py")
            return module, (await sandbox.exec(["ls", "src", "tests"])).stdout.split()

    first = box.run(listing(changed))
    assert first == (b"x = 1\n", ["src:", "mod.py", "more.py", "tests:", "test_mod.py"])
    second = box.run(listing(tree))
    assert second == (
        MODULE.encode(),
        ["src:", "mod.py", "tests:", "conftest.py", "test_mod.py"],
    )


def test_the_pristine_tree_is_never_touched(box: Box, tree: Tree) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tree.root.rglob("*.*")}

    async def work():
        async with box.pool.lease(tree) as sandbox:
            await sandbox.write("src/mod.py", b"x")
            await sandbox.exec(["sh", "-c", "for f in * */*; do echo bad >> $f; done"])
            await sandbox.run_tests(ids("test_add"))

    box.run(work())
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tree.root.rglob("*.*")}


# -- compiled files


def test_a_stale_pyc_is_never_used(box: Box, tree: Tree) -> None:
    """Same size, same second: what a `.pyc` cannot tell apart must still be told apart."""
    moment = 1_600_000_000
    for path in tree.root.rglob("*.py"):
        os.utime(path, (moment, moment))
    assert box.run(prebuild(tree.root, ("src",), ["tests/test_mod.py"], box.pool)) >= 3
    compiled = [path.name for path in (tree.root / "src/__pycache__").iterdir()]
    assert len(compiled) == 1
    tests = [path.name for path in (tree.root / "tests/__pycache__").iterdir()]
    assert any("-pytest-" in name and name.startswith("test_mod.") for name in tests)

    async def work():
        async with box.pool.lease(tree) as sandbox:
            # the compiled one is read at all
            script = "python3 -vc 'import mod' 2>&1 | grep matches | grep __pycache__/mod"
            assert (await sandbox.exec(["sh", "-c", script])).stdout
            for operator, outcome in ("-", "failed"), ("+", "passed"), ("*", "failed"):
                source = MODULE.replace("a + b", f"a {operator} b")
                await sandbox.write("src/mod.py", source.encode())
                seen = outcomes(await sandbox.run_tests(ids("test_add")))
                assert seen == {"test_add": outcome}, operator
        mutated = dataclasses.replace(
            tree, overlay={"src/mod.py": MODULE.replace("a + b", "a - b").encode()}
        )
        for leased, outcome in (mutated, "failed"), (tree, "passed"), (mutated, "failed"):
            async with box.pool.lease(leased) as sandbox:
                report = await sandbox.run_tests(ids("test_add", "test_from_conftest"))
                assert outcomes(report) == {"test_add": outcome, "test_from_conftest": "passed"}
        # the compiled test file knows where it was compiled; frames must not
        async with box.pool.lease(tree) as sandbox:
            report = await sandbox.run_tests(ids("test_deep"))
            assert [f.path for f in report.cases[0].frames] == ["tests/test_mod.py", "src/mod.py"]
            assert report.cases[0].frames[0].source_line == "mod.boom(7)"

    box.run(work())


# -- commands


def test_exec(box: Box, tree: Tree) -> None:
    async def work():
        async with box.pool.lease(tree) as sandbox:
            return [
                await sandbox.exec(["cat"], stdin=b"\xc3\xa9\n"),
                await sandbox.exec(["sh", "-c", "echo out; echo err >&2; exit 3"]),
                await sandbox.exec(["sh", "-c", "kill -TERM $$"]),
                await sandbox.exec(["no-such-program"]),
                await sandbox.exec(["./data.bin"]),
                await sandbox.exec(["python3", "-c", "import mod, pytest; print(mod.add(1, 1))"]),
                await sandbox.exec(["sh", "-c", "yes | head -1"]),
            ]

    echo, script, killed, missing, refused, python, pipe = box.run(work())
    assert (echo.exit_code, echo.stdout) == (0, "é\n")
    assert (script.exit_code, script.stdout, script.stderr) == (3, "out\n", "err\n")
    assert killed.exit_code == -signal.SIGTERM and killed.killed_by is None
    assert missing.exit_code == 127 and "no-such-program" in missing.stderr
    assert refused.exit_code == 126
    assert python.stdout == "2\n"
    assert (pipe.stdout, pipe.stderr) == ("y\n", "")


def test_impossible_commands_are_the_askers_fault(box: Box, tree: Tree) -> None:
    async def work(argv):
        async with box.pool.lease(tree) as sandbox:
            await sandbox.exec(argv)

    for argv in ([], [""], ["a\0b"]):
        with pytest.raises(SandboxError):
            box.run(work(argv))


def test_only_the_standard_library_and_pytest_are_there(box: Box, tree: Tree) -> None:
    """What happens to be installed around the harness must not decide how tests go."""
    code = "import importlib.util as u; print([n for n in %r if u.find_spec(n)])"
    names = ["pip", "hypothesis", "jax", "numpy", "yaml", "pytest", "json"]

    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.exec(["python3", "-c", code % names])

    if box.pool.backend == "bwrap":
        assert box.run(work()).stdout == "['pytest', 'json']\n"
    test = f"import importlib.util as u\nNAMES = {names[:5]}\n"
    test += "def test(): assert not [n for n in NAMES if u.find_spec(n)]"
    tree = dataclasses.replace(tree, overlay={"tests/test_x.py": test.encode()})

    async def inside():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(["tests/test_x.py::test"])

    assert box.run(inside()).exit_code == 0


# -- the pool


def test_leases_are_apart_and_in_turn(box: Box, tree: Tree) -> None:
    order = []

    async def one(number):
        async with box.pool.lease(tree) as sandbox:
            order.append(number)
            await sandbox.write("mine", str(number).encode())
            await asyncio.sleep(0.02)
            assert await sandbox.read("mine") == str(number).encode()

    async def work():
        await asyncio.gather(*(one(number) for number in range(8)))

    async def warm_up():
        async with box.pool.lease(tree), box.pool.lease(tree):
            pass

    box.run(warm_up())
    box.run(work())
    # two at a time, so neighbours may overtake
    assert all(abs(place - number) <= 1 for place, number in enumerate(order)), order


def test_a_cancelled_request_leaves_a_working_slot(box: Box, tree: Tree) -> None:
    async def hang():
        async with box.pool.lease(tree) as sandbox:
            await sandbox.exec(["sleep", "60"])

    async def work():
        tasks = [asyncio.create_task(hang()) for _ in range(3)]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):
            async with box.pool.lease(tree) as sandbox:
                assert (await sandbox.run_tests(ids("test_add"))).passed(ids("test_add"))

    box.run(work())


def test_a_returned_sandbox_cannot_be_used(box: Box, tree: Tree) -> None:
    async def work():
        async with box.pool.lease(tree) as sandbox:
            pass
        with pytest.raises(RuntimeError):
            await sandbox.read("src/mod.py")

    box.run(work())


def test_unknown_backends_are_refused(tree: Tree, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    box = Box("bwrap")

    async def work():
        async with box.pool.lease(tree):
            pass

    with pytest.raises(InputError, match="bubblewrap"):
        box.run(work())
    box.close()


def test_auto_falls_back_and_says_so_once(tree: Tree, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    box = Box("auto")

    async def one():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(ids("test_add"))

    async def work():
        return await asyncio.gather(one(), one())

    assert all(report.passed(ids("test_add")) for report in box.run(work()))
    assert box.pool.backend == "plain"
    box.close()
    assert capfd.readouterr().err.count("does NOT isolate") == 1


# -- what was run before


def test_memo_answers_only_what_it_knows(tree: Tree) -> None:
    memo = TestMemo()
    box = Box(BACKENDS[0], memo=memo)
    asked = ids("test_add")
    broken = MODULE.replace("a + b", "a - b").encode()

    async def work():
        async with box.pool.lease(tree) as sandbox:
            first = await sandbox.run_tests(asked)
            assert (memo.hits, memo.misses) == (0, 1)
            assert await sandbox.run_tests(asked) is first
            await sandbox.write("src/mod.py", broken)
            assert not (await sandbox.run_tests(asked)).passed(asked)
            assert (memo.hits, memo.misses) == (1, 2)
            await sandbox.write("src/mod.py", MODULE.encode())
            assert (await sandbox.run_tests(asked)).passed(asked)
        # another lease, put together differently, of the same contents
        async with box.pool.lease(dataclasses.replace(tree, overlay={"src/mod.py": broken})) as s:
            hits = memo.hits
            assert not (await s.run_tests(asked)).passed(asked)
            assert memo.hits == hits + 1
            # a command that changes nothing does no harm
            await s.exec(["ls"])
            await s.run_tests(asked)
            assert memo.hits == hits + 2
            # one that changes the tree does, from then on
            await s.exec(["sh", "-c", "sed -i 's/a - b/a + b/' src/mod.py"])
            assert (await s.run_tests(asked)).passed(asked)
            await s.exec(["sh", "-c", "sed -i 's/a + b/a - b/' src/mod.py"])
            assert not (await s.run_tests(asked)).passed(asked)
            assert memo.hits == hits + 2
        async with box.pool.lease(tree) as sandbox:
            assert (await sandbox.run_tests(asked)).passed(asked)
            # other tests, another limit: other runs
            misses = memo.misses
            await sandbox.run_tests(ids("test_wrong"))
            await sandbox.run_tests(asked, timeout_s=3)
            assert memo.misses == misses + 2
            slow = {"tests/test_slow.py": b"import time\ndef test_s(): time.sleep(0.6)\n"}
        async with box.pool.lease(dataclasses.replace(tree, overlay=slow)) as sandbox:
            for _ in range(2):
                late = await sandbox.run_tests(["tests/test_slow.py::test_s"], timeout_s=0.3)
                assert late.killed_by == "deadline"
            hits = memo.hits
            assert (await sandbox.run_tests(["tests/test_slow.py::test_s"])).exit_code == 0
            assert memo.hits == hits  # what was cut short was not remembered

    box.run(work())
    box.close()


def test_memo_keys_tell_everything_apart(tmp_path) -> None:
    tree = Tree(tmp_path, {}, (".",))
    base = {"edits": {"a": b"b"}, "ids": ["t::a"], "limits": LIMITS, "wall_s": 1.0}
    keys = {memo_key(tree, **base)}
    for change in (
        {"edits": {"a": b"c"}},
        {"edits": {"ab": b""}},
        {"edits": {"a": None}},
        {"edits": {"a": b"b", "c": b""}},
        {"edits": {}},
        {"ids": ["t::a", "t::b"]},
        {"ids": ["t::a', 't::b"]},
        {"limits": dataclasses.replace(LIMITS, memory_mib=1)},
        {"wall_s": 2.0},
    ):
        keys.add(memo_key(tree, **{**base, **change}))
    keys.add(memo_key(dataclasses.replace(tree, python_path=("src",)), **base))
    keys.add(memo_key(dataclasses.replace(tree, root=tmp_path / "x"), **base))
    assert len(keys) == 12


def test_memo_forgets_the_least_recent(tree: Tree) -> None:
    memo = TestMemo(size=2)
    box = Box(BACKENDS[0])

    async def work():
        async with box.pool.lease(tree) as sandbox:
            return await sandbox.run_tests(ids("test_add"))

    report = box.run(work())
    box.close()
    for key in (b"a", b"b"):
        memo.put(key, report)
    memo.get(b"a")
    memo.put(b"c", report)
    assert [memo.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]


# -- nothing is left


def marked(text: str) -> list[str]:
    """Commands running on this machine that mention `text`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if text.encode() in command:
            found.append(command.decode(errors="replace"))
    return found


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_closed_pool_leaves_nothing(kind: str, tree: Tree) -> None:
    box = Box(kind)

    async def work():
        async with box.pool.lease(tree) as sandbox:
            await sandbox.exec(["touch", "x"])
            return box.pool._folder

    folder = box.run(work())
    assert folder.exists() and folder.stat().st_mode & 0o077 in (0, 0o011)
    assert marked(str(folder))
    box.close()
    assert not folder.exists()
    assert not marked(str(folder))
    assert str(folder) not in Path("/proc/mounts").read_text()


HARNESS = """
import asyncio, sys
from pathlib import Path
from sandbox.base import Tree
from sandbox.local import LocalPool

async def main():
    pool = LocalPool(1, backend=sys.argv[1])
    async with pool.lease(Tree(Path(sys.argv[2]))) as sandbox:
        print(pool._folder, flush=True)
        await sandbox.exec(["sh", "-c", "setsid sleep 98765 & sleep 98765"], timeout_s=60)

asyncio.run(main())
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_harness_leaves_no_process_and_the_next_one_sweeps(
    backend: str, tree: Tree
) -> None:
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS, backend, str(tree.root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    folder = Path(harness.stdout.readline().strip())
    deadline = time.monotonic() + 10
    while len(marked("98765")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(marked("98765")) >= 3
    sweep(folder.parent)
    assert folder.exists()  # it lives
    harness.send_signal(signal.SIGKILL)
    harness.wait()
    while (marked("98765") or marked(str(folder))) and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert not marked("98765") and not marked(str(folder))
    assert folder.name.startswith(PREFIX)
    sweep(folder.parent)
    assert not folder.exists()


def test_an_unclosed_pool_is_cleaned_up_at_exit(tree: Tree) -> None:
    code = HARNESS.replace("sleep 98765 & sleep 98765", "sleep 87654 & true")
    done = subprocess.run(
        [sys.executable, "-c", code, BACKENDS[0], str(tree.root)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    assert not Path(done.stdout.strip()).exists()
    assert not marked("87654")


def test_those_who_wait_hear_of_a_start_that_failed(tree: Tree) -> None:
    class Failing(LocalPool):
        starts = 0

        async def _new_slot(self):
            self.starts += 1
            await asyncio.sleep(0.01)
            if self.starts <= 2:
                raise SandboxBroken("not yet")
            return await super()._new_slot()

    async def one(pool):
        async with pool.lease(tree) as sandbox:
            return (await sandbox.run_tests(ids("test_add"))).passed(ids("test_add"))

    async def work():
        async with Failing(1, LIMITS, BACKENDS[0]) as pool:
            return await asyncio.gather(*(one(pool) for _ in range(4)), return_exceptions=True)

    results = asyncio.run(work())
    assert [type(result) for result in results[:2]] == [SandboxBroken] * 2
    assert results[2:] == [True, True]


def test_asking_for_plain_warns_once_too(tree: Tree) -> None:
    told: list[str] = []

    async def work():
        async with LocalPool(2, LIMITS, "plain", warn=told.append) as pool:
            async with pool.lease(tree), pool.lease(tree):
                pass

    asyncio.run(work())
    assert len(told) == 1 and "does NOT isolate" in told[0]


def test_a_cancelled_run_is_not_taken_for_an_untouched_tree(tree: Tree) -> None:
    """A test that changed the tree and was cancelled: no remembered report may answer for it."""
    memo = TestMemo()
    slow = (
        "import pathlib, time\ndef test():\n    p = pathlib.Path('flag')\n"
        "    if p.exists(): return\n    p.write_text('x'); time.sleep(60)\n"
    )
    tree = dataclasses.replace(tree, overlay={"tests/test_slow.py": slow.encode()})
    asked = ["tests/test_slow.py::test"]

    async def work():
        async with LocalPool(1, LIMITS, BACKENDS[0], memo) as pool, pool.lease(tree) as sandbox:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2):
                    await sandbox.run_tests(asked)
            assert (await sandbox.run_tests(asked)).passed(asked)  # `flag` is there, this time
            assert memo.get(memo_key(tree, tree.overlay, asked, LIMITS, LIMITS.wall_s)) is None

    asyncio.run(work())


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        LocalPool(0)
    with pytest.raises(InputError, match="bwrap"):
        LocalPool(1, backend="dockr")


def test_a_closed_pool_stays_closed(tree: Tree) -> None:
    pool = LocalPool(1, LIMITS, BACKENDS[0])

    async def waiting():
        async with pool.lease(tree):
            pass

    async def work():
        async with pool.lease(tree):
            waiter = asyncio.create_task(waiting())
            await asyncio.sleep(0)
            await pool.close()
            with pytest.raises(asyncio.CancelledError):
                await waiter
        with pytest.raises(RuntimeError, match="closed"):
            await waiting()

    asyncio.run(work())


def test_a_pool_outlives_an_event_loop(tree: Tree) -> None:
    pool = LocalPool(2, LIMITS)

    async def one():
        async with pool.lease(tree) as sandbox:
            return await sandbox.run_tests(ids("test_add"))

    async def work():
        return await asyncio.gather(*(one() for _ in range(5)))

    for _ in range(2):
        assert all(report.passed(ids("test_add")) for report in asyncio.run(work()))
    asyncio.run(pool.close())
