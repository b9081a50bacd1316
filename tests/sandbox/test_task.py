"""Tasks on disk and in memory, and the verdict on patches of all kinds, over a small package."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.local import LocalPool
from sandbox.near_misses import KINDS, near_misses
from sandbox.patch import apply_patch, make_patch
from sandbox.shipped import instruction
from sandbox.task import ALWAYS_PROTECTED, Task, load_tasks
from sandbox.verdict import Verdict
from sandbox.verdict import judge as judge_task
from tests.sandbox.releases import sdist
from tools import cli

SOURCE = '''\
"""Sums."""


def total(numbers, start=0):
    """Add up."""
    result = start
    for number in numbers:
        result += number
    return result
'''
TESTS = """\
from mini.sums import total


def test_total():
    assert total([1, 2]) == 3


def test_start():
    assert total([], 5) == 5
"""
BUGGY = SOURCE.replace("result += number", "result -= number")
MODULE = "src/mini/sums.py"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task over a release that lies, as if fetched, in a cache of its own."""
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    files = {"src/mini/__init__.py": "", MODULE: SOURCE, "tests/test_sums.py": TESTS}
    archive = sdist(files)
    task = Task(
        name="mini-total-augmented-123456",
        source="procedural",
        split="train",
        package="mini",
        version="1.0",
        sdist_sha256=hashlib.sha256(archive).hexdigest(),
        licence="MIT",
        module=MODULE,
        function="total",
        operator="augmented",
        instruction="Tests fail because of a bug in `total`.",
        fail_to_pass=("tests/test_sums.py::test_total",),
        pass_to_pass=("tests/test_sums.py::test_start",),
        python_path=("src",),
        bug_patch=make_patch({MODULE: SOURCE.encode()}, {MODULE: BUGGY.encode()}),
        protected=("tests", "tests/*", *ALWAYS_PROTECTED),
    )
    task.release.archive.parent.mkdir(parents=True)
    task.release.archive.write_bytes(archive)
    task.tree()
    return task


@pytest.fixture
def folder(task: Task, tmp_path: Path) -> Path:
    task.save(tmp_path / "tasks" / task.name)
    return tmp_path / "tasks" / task.name


def diff(path: str, old: str, new: str) -> str:
    a, b = old.splitlines(keepends=True), new.splitlines(keepends=True)
    return "".join(difflib.unified_diff(a, b, f"a/{path}" if old else "/dev/null", f"b/{path}"))


def judge(folder: Path, patch: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> dict:
    """The command line's verdict, its exit code under "exit"."""
    file = tmp_path / "fix.patch"
    file.write_text(patch)
    code = cli.main(["tasks", "judge", str(folder), str(file), "--json"])
    return {**json.loads(capsys.readouterr().out), "exit": code}


# -- on disk and back


def test_a_task_comes_back_from_disk_as_it_was(task: Task, folder: Path) -> None:
    loaded = Task.load(folder)
    assert loaded == task
    assert loaded.files() == {MODULE: BUGGY.encode()}
    tree = loaded.tree()
    assert (tree.root / MODULE).read_text() == SOURCE
    assert tree.overlay == {MODULE: BUGGY.encode()} and tree.python_path == ("src",)
    assert loaded.gold_patch == make_patch({MODULE: BUGGY.encode()}, {MODULE: SOURCE.encode()})


def test_a_task_directory_needs_neither_cache_nor_index(
    task: Task, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert load_tasks(folder.parent) == [task]
    assert load_tasks(folder.parent, split="heldout") == []
    assert Task.load(folder).tree().root.is_dir()


def test_what_a_killed_save_left_is_no_task(task: Task, folder: Path) -> None:
    shutil.copytree(folder, folder.parent / f".{folder.name}.ab12")
    (folder.parent / f".{folder.name}.ab12" / "tests" / "tests.json").unlink()
    assert load_tasks(folder.parent) == [task]


def test_the_directory_is_what_harbor_expects(task: Task, folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "task.toml",
        "instruction.md",
        *(f"environment/{name}" for name in ("Dockerfile", "requirements.txt", "bug.patch")),
        *("environment/mini-1.0.tar.gz", "tests/mini-1.0.tar.gz"),
        *(f"tests/{name}" for name in ("test.sh", "judge.py", "tests.json")),
        *(f"solution/{name}" for name in ("solve.sh", "gold.patch")),
    }
    assert os.path.samefile(folder / "tests/mini-1.0.tar.gz", task.release.archive)
    assert os.access(folder / "tests/test.sh", os.X_OK)
    dockerfile = (folder / "environment/Dockerfile").read_text()
    assert "COPY mini-1.0.tar.gz bug.patch" in dockerfile and "PYTHONPATH=/app/src" in dockerfile
    for line in (folder / "environment/requirements.txt").read_text().splitlines():
        assert line.startswith("#") or "--hash=sha256:" in line


def test_no_text_of_the_release_is_in_instruction_or_settings(folder: Path) -> None:
    for name in ("task.toml", "instruction.md", "tests/tests.json"):
        assert "result" not in (folder / name).read_text()


def test_the_instruction_names_a_test() -> None:
    text = instruction("a/b.py", "f", tuple(f"t.py::t{i}" for i in range(5)))
    assert text.splitlines()[1] == "Failing: t.py::t0 and 4 more"
    assert "`f` in `a/b.py`" in text


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        # a new file: the old one may be a link into the cache
        (folder / name).unlink()
        (folder / name).write_text(text.replace(old, new))

    return change


def replace_archive(folder: Path) -> None:
    shutil.rmtree(folder.parents[1] / "cache")
    (folder / "environment/mini-1.0.tar.gz").unlink()
    (folder / "environment/mini-1.0.tar.gz").write_bytes(b"other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "task.toml").unlink(), "task.toml"),
        (lambda folder: (folder / "environment/bug.patch").unlink(), "bug.patch"),
        (lambda folder: (folder / "environment/mini-1.0.tar.gz").unlink(), "archive is missing"),
        (replace_archive, "is pinned for mini 1.0"),
        (rewrite("task.toml", "[metadata.remend]", "[metadata.remend"), "task.toml"),
        (rewrite("task.toml", "[metadata.remend]", "[metadata.other]"), "metadata.remend"),
        (rewrite("task.toml", "version", "ersion"), "version"),
        (rewrite("task.toml", 'package = "mini"', 'package = "../mini"'), "not a package"),
        (rewrite("task.toml", MODULE, "../../etc/passwd"), "leads out"),
        (rewrite("task.toml", 'licence = "MIT"', "licence = 7"), "licence"),
        (rewrite("task.toml", 'split = "train"', 'split = "train"\nextra = "x"'), "extra"),
        (rewrite("task.toml", "licence =", 'origin = "image"\nlicence ='), "name of an image"),
        (lambda folder: (folder / "task.toml").write_text("metadata = 3\n"), "metadata.remend"),
        (rewrite("task.toml", '"setup.cfg"', '"src/*"'), "is protected"),
        (rewrite("tests/tests.json", "{", "["), "tests.json"),
        (rewrite("tests/tests.json", "tests/test_sums.py::test_total", ""), "fail_to_pass"),
        (rewrite("environment/bug.patch", "-        result", "-        resul"), "does not apply"),
    ],
)
def test_a_damaged_task_is_one_clear_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: Callable, message: str
) -> None:
    damage(folder)
    (tmp_path / "empty.patch").write_text("")
    code = cli.main(["tasks", "judge", str(folder), str(tmp_path / "empty.patch")])
    told = capsys.readouterr().err.strip()
    assert code == 2
    assert told.splitlines()[-1].startswith("remend: error:") and message in told
    assert "Traceback" not in told


# -- verdicts


def test_the_known_fix_passes(
    task: Task, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    verdict = judge(folder, task.gold_patch, tmp_path, capsys)
    assert (verdict["verdict"], verdict["exit"], verdict["flags"]) == ("pass", 0, [])
    assert verdict["fail_to_pass"] == {"tests/test_sums.py::test_total": "passed"}


EASY = "def test_total():\n    pass\n\n\ndef test_start():\n    pass\n"
MAKE_GREEN = """\
import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    outcome.get_result().outcome = "passed"
"""
CHEATS = {
    "nothing": "",
    "tests only": diff("tests/test_sums.py", TESTS, EASY),
    "tests deleted": make_patch({"tests/test_sums.py": TESTS.encode()}, {}),
    "conftest at the root": diff("conftest.py", "", MAKE_GREEN),
    "conftest in tests": diff("tests/conftest.py", "", MAKE_GREEN),
    "conftest in the source": diff("src/mini/conftest.py", "", MAKE_GREEN),
    "pytest.ini": diff("pytest.ini", "", "[pytest]\naddopts = --collect-only\n"),
    "sitecustomize": diff("src/sitecustomize.py", "", "import os\nos._exit(0)\n"),
    "another pytest": diff("src/pytest.py", "", "def main(*a, **k):\n    return 0\n"),
    "shadowed module": diff("src/json.py", "", "import os\nos._exit(0)\n"),
    "compiled code": diff("src/mini/__pycache__/sums.cpython-311.pyc", "", "not really\n"),
    "leaves early": diff(MODULE, BUGGY, "import os\nos._exit(0)\n"),
    "skips": diff(MODULE, BUGGY, "import pytest\npytest.skip('x', allow_module_level=True)\n"),
    "does not fit": diff(MODULE, BUGGY.replace("result", "other"), SOURCE),
    "leads out": diff("../outside.py", "", "x = 1\n"),
    "not a patch": "please\n",
}


@pytest.mark.parametrize("name", CHEATS)
def test_nothing_but_a_repair_passes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    verdict = judge(folder, CHEATS[name], tmp_path, capsys)
    assert (verdict["verdict"], verdict["exit"]) == ("fail", 1)


def test_in_full_the_fix_passes_and_no_cheat_does(
    task: Task, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the command line, then all of them; the suite is measured once."""
    file = tmp_path / "fix.patch"
    file.write_text(task.gold_patch)
    full = ["tasks", "judge", str(folder), str(file), "--environment", "full", "--json"]
    assert cli.main(full) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["judged_in"], verdict["build"]) == ("full", "passed")
    assert {*verdict["fail_to_pass"], *verdict["pass_to_pass"]} == {
        f"tests/test_sums.py::test_{name}" for name in ("total", "start")
    }

    async def rest() -> list[Verdict]:
        async with LocalPool(1) as pool:
            return [await judge_task(task, p, pool, environment="full") for p in CHEATS.values()]

    assert {verdict.verdict for verdict in asyncio.run(rest())} == {"fail"}


def test_near_misses_are_judged_in_both_and_kept(
    task: Task, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    attempts = near_misses(task, 2, 0)
    assert attempts == near_misses(task, 2, 0) != near_misses(task, 2, 1)
    assert len({attempt.patch for attempt in attempts}) == len(attempts)
    kinds = [attempt.kind for attempt in attempts]
    assert kinds[:2] == ["gold", "noop"] and set(kinds) <= set(KINDS)
    assert attempts[0].patch == task.gold_patch and attempts[1].patch == ""
    for attempt in attempts:
        apply_patch(task.files(), attempt.patch)
    out = tmp_path / "agree.jsonl"
    command = ["tasks", "agree", "--index", str(folder.parent), "--out", str(out), "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert found["agreement"]["n"] == len(rows) >= 3 and found["left_out"] == 0
    assert found["by_kind"]["gold"]["both_pass"] == found["by_kind"]["noop"]["both_fail"] == 1
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # killed before the last
    assert cli.main([*command[:-1]]) == 0
    assert f"{len(rows)} diffs" in capsys.readouterr().out
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(again) == len(rows) and again[:-1] == rows[:-1]


def test_a_repair_that_also_edits_tests_is_judged_without_them(
    task: Task, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    patch = task.gold_patch + CHEATS["tests only"]
    verdict = judge(folder, patch, tmp_path, capsys)
    assert verdict["verdict"] == "pass"
    assert verdict["flags"] == ["protected:tests/test_sums.py"]


def test_verify_runs_both_controls(task: Task, folder: Path, capsys: pytest.CaptureFixture) -> None:
    harmless = SOURCE.replace('"""Add up."""', '"""Add."""')
    sound = replace(
        task,
        name="mini-sound",
        bug_patch=make_patch({MODULE: SOURCE.encode()}, {MODULE: harmless.encode()}),
    )
    command = ["tasks", "verify", "--index", str(folder.parent), "--repeat", "2", "--json"]
    assert cli.main(command) == 0
    check = json.loads(capsys.readouterr().out)
    assert (check["verified"], check["failed"]) == (1, 0)
    assert check["tasks"][0]["before"] == "fail" and check["tasks"][0]["after"] == "pass"
    sound.save(folder.parent / sound.name)
    assert cli.main(command) == 1
    checks = {c["task"]: c for c in json.loads(capsys.readouterr().out)["tasks"]}
    assert not checks["mini-sound"]["flips"]
    assert "test_total is passed" in checks["mini-sound"]["before"]


# -- the verdict that travels with the directory


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 1),
        ({MODULE: SOURCE}, 0),
        ({"tests/test_sums.py": EASY}, 1),
        ({"conftest.py": MAKE_GREEN}, 1),
    ],
    ids=["buggy", "fixed", "tests edited", "conftest"],
)
def test_harbors_own_test_script_agrees(
    task: Task, folder: Path, tmp_path: Path, changes: dict[str, str], code: int
) -> None:
    app = tmp_path / "app"
    shutil.copytree(task.release.tree, app)
    for path, data in {**task.files(), **{p: t.encode() for p, t in changes.items()}}.items():
        (app / path).write_bytes(data)
    command = [
        sys.executable,
        "-I",
        str(folder / "tests/judge.py"),
        str(app),
        str(folder / "tests"),
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == code
