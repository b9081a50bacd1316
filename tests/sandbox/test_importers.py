"""Other projects' tasks become directories that verify, judge and stats take like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.checks import test_places as places_of
from sandbox.image_task import ImageTask
from sandbox.importers import quixbugs as importer
from sandbox.importers.carried import read_commit, read_folder
from sandbox.importers.for_image import test_command as command_of
from sandbox.importers.rows import pytest_ids
from sandbox.patch import make_patch
from sandbox.task import Task, load_tasks
from tools import cli

FIXED = '"""Sums."""\n\n\ndef total(numbers):\n    return sum(numbers)\n'
BUGGY = FIXED.replace("sum(numbers)", "sum(numbers[1:])")
OLD_TESTS = "from calc.sums import total\n\n\ndef test_empty():\n    assert total([]) == 0\n"
NEW_TESTS = (
    OLD_TESTS + "\n\nclass TestSum:\n    def test_two(self):\n        assert total([1, 2]) == 3\n"
)
MODULE, TESTS = "src/calc/sums.py", "tests/test_sums.py"
MIT = "Permission is hereby granted, free of charge, to any person\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def put(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def diff(path: str, old: str, new: str) -> str:
    sides = ({path: text.encode()} if text else {} for text in (old, new))
    return make_patch(*sides)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # no index is to be asked


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, str, str]:
    """A git repository, its commit with the bug, and one without."""
    folder = tmp_path / "checkout"
    put(folder, {MODULE: BUGGY, "src/calc/__init__.py": "", TESTS: OLD_TESTS, "LICENSE": MIT})
    put(folder, {".gitattributes": "tests export-ignore\n"})
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "one")
    buggy = git(folder, "rev-parse", "HEAD")
    put(folder, {MODULE: FIXED})
    git(folder, "commit", "-qam", "two")
    return folder, buggy, git(folder, "rev-parse", "HEAD")


def swe_bench(commit: str, **changes: Any) -> dict[str, Any]:
    row = {
        "instance_id": "acme__calc-7",
        "repo": "acme/calc",
        "base_commit": commit,
        "patch": diff(MODULE, BUGGY, FIXED),
        "test_patch": diff(TESTS, OLD_TESTS, NEW_TESTS),
        "problem_statement": "total() forgets the first number.",
        "hints_text": "",
        "created_at": "2026-01-02",
        "version": "1.0",
        "FAIL_TO_PASS": json.dumps([f"{TESTS}::TestSum::test_two"]),
        "PASS_TO_PASS": json.dumps([f"{TESTS}::test_empty"]),
        "environment_setup_commit": commit,
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not None}


def swe_smith(commit: str, **changes: Any) -> dict[str, Any]:
    row = {
        "instance_id": f"acme__calc.{commit[:8]}.func_basic__abc123",
        "repo": f"swesmith/acme__calc.{commit[:8]}",
        "patch": diff(MODULE, FIXED, BUGGY),
        "FAIL_TO_PASS": [f"{TESTS}::TestSum::test_two"],
        "PASS_TO_PASS": [f"{TESTS}::test_empty"],
        "image_name": f"jyangballin/swesmith.x86_64.acme_1776_calc.{commit[:8]}",
        "problem_statement": "total() forgets the first number.",
    }
    return {**row, **changes}


def r2e(buggy: str, fixed: str, **changes: Any) -> dict[str, Any]:
    def change(path: str, old: str, new: str) -> dict[str, Any]:
        return {
            "old_file_content": old,
            "new_file_content": new,
            "header": {"file": {"path": path}},
        }

    parsed = {
        "file_diffs": [change(TESTS, OLD_TESTS, NEW_TESTS), change(MODULE, BUGGY, FIXED)],
        "old_commit_hash": buggy,
        "new_commit_hash": fixed,
    }
    log = (
        "=== short test summary info ===\n"
        "\x1b[32mPASSED\x1b[0m r2e_tests/test_1.py::\x1b[1mtest_empty\x1b[0m\n"
        "\x1b[31mFAILED\x1b[0m r2e_tests/test_1.py::TestSum::\x1b[1mtest_two\x1b[0m - assert 2\n"
    )
    ran = {
        "test_file_names": ["test_1.py"],
        "test_file_codes": [NEW_TESTS],
        "old_commit_res_stdout": log,
    }
    row = {
        "repo_name": "calc",
        "docker_image": f"namanjain12/calc_final:{fixed}",
        "commit_hash": fixed,
        "parsed_commit_content": json.dumps(parsed),
        "execution_result_content": json.dumps(ran),
        "expected_output_json": json.dumps({"test_empty": "PASSED", "TestSum.test_two": "PASSED"}),
        "problem_statement": "[ISSUE]\ntotal() forgets the first number.\n[/ISSUE]",
    }
    return {**row, **changes}


def rows(path: Path, *records: dict[str, Any] | str) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, Any, str]:
    code = cli.main(["tasks", *map(str, arguments), "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out) if told.out else None, told.err


def test_rows_with_their_repository_run_here(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, buggy, fixed = repository
    put(folder, {TESTS: NEW_TESTS})
    git(folder, "commit", "-qam", "three")
    tested = git(folder, "rev-parse", "HEAD")
    out = tmp_path / "tasks"
    records = (swe_bench(buggy), swe_smith(tested), r2e(buggy, fixed))
    for number, record in enumerate(records):
        source = rows(tmp_path / f"{number}.jsonl", record)
        code, answer, _ = run(capsys, "import", source, "--out", out, "--repo-dir", folder)
        assert (code, answer["imported"], answer["refused"]) == (0, 1, {})
    tasks = {
        dict(p.partition("=")[::2] for p in t.provenance)["format"]: t for t in load_tasks(out)
    }
    assert set(tasks) == {"swe-bench", "swe-smith", "r2e"}
    for task in tasks.values():
        assert (task.source, task.module, task.function) == ("imported", MODULE, "total")
        assert task.licence == "MIT" and "forgets the first number" in task.instruction
        assert task.gold_patch == diff(MODULE, BUGGY, FIXED)
        assert "[ISSUE]" not in task.instruction
        # in full the whole suite counts, beyond the row's own files
        assert "tests" in places_of(task, task.tree().root)
    assert tasks["swe-bench"].fail_to_pass == (f"{TESTS}::TestSum::test_two",)
    assert tasks["r2e"].fail_to_pass == ("r2e_tests/test_1.py::TestSum::test_two",)
    assert tasks["r2e"].pass_to_pass == ("r2e_tests/test_1.py::test_empty",)
    assert tasks["swe-bench"].split == "heldout" and tasks["swe-smith"].split == "train"

    shutil.rmtree(tmp_path / "cache")  # a directory carries all that it needs
    code, proof, _ = run(capsys, "verify", "--index", out)
    assert (code, proof["verified"], proof["failed"]) == (0, 3, 0)
    code, counts, _ = run(capsys, "stats", "--index", out)
    assert counts["source"] == {"imported": 3}
    patch = tmp_path / "fix.patch"
    patch.write_text(tasks["r2e"].gold_patch)
    assert run(capsys, "judge", out / tasks["r2e"].name, patch)[1]["verdict"] == "pass"
    patch.write_text(diff(TESTS, NEW_TESTS, "def test_empty():\n    pass\n"))
    assert run(capsys, "judge", out / "acme__calc-7", patch)[1]["verdict"] == "fail"

    # an archive that is not the one the task names is never unpacked
    shutil.copytree(out / "acme__calc-7", tmp_path / "bad" / "acme__calc-7")
    shutil.rmtree(tmp_path / "cache")
    (archive,) = (tmp_path / "bad/acme__calc-7/environment").glob("*.tar.gz")
    archive.unlink()
    archive.write_bytes(b"other")
    code, _, err = run(capsys, "verify", "--index", tmp_path / "bad")
    assert code == 2 and "is pinned for acme__calc" in err

    # the same again changes nothing; another task of that name is refused
    source = rows(tmp_path / "again.jsonl", swe_bench(buggy))
    code, answer, _ = run(capsys, "import", source, "--out", out, "--repo-dir", folder)
    assert (code, answer["imported"], answer["there_already"]) == (0, 0, 1)
    source = rows(tmp_path / "other.jsonl", swe_bench(buggy, problem_statement="Another."))
    code, _, err = run(capsys, "import", source, "--out", out, "--repo-dir", folder)
    assert code == 2 and "exists already, and is another task" in err


def test_a_fix_that_adds_a_file_goes_both_ways(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, buggy, _ = repository
    uses = "from calc.more import first\n\n\ndef test_first():\n    assert first([4]) == 4\n"
    row = swe_bench(
        buggy,
        patch=diff("src/calc/more.py", "", "def first(numbers):\n    return numbers[0]\n"),
        test_patch=diff("tests/test_more.py", "", uses),
        FAIL_TO_PASS=["test_first"],  # SymPy's rows name tests like this
        PASS_TO_PASS=[],
    )
    out = tmp_path / "tasks"
    source = rows(tmp_path / "rows.jsonl", row)
    assert run(capsys, "import", source, "--out", out, "--repo-dir", folder)[0] == 0
    assert Task.load(out / "acme__calc-7").fail_to_pass == ("tests/test_more.py::test_first",)
    code, proof, _ = run(capsys, "verify", "--index", out)
    assert (code, proof["verified"]) == (0, 1), proof


def test_rows_without_a_tree_say_which_image_they_need(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, buggy, fixed = repository
    out = tmp_path / "tasks"
    images = (
        "swebench/sweb.eval.x86_64.acme_1776_calc-7:latest",
        f"jyangballin/swesmith.x86_64.acme_1776_calc.{fixed[:8]}",
        f"namanjain12/calc_final:{fixed}",
    )
    for number, row in enumerate((swe_bench(buggy), swe_smith(fixed), r2e(buggy, fixed))):
        source = rows(tmp_path / f"{number}.jsonl", row)
        assert run(capsys, "import", source, "--out", out)[1]["imported"] == 1
    tasks = load_tasks(out)
    assert all(isinstance(task, ImageTask) for task in tasks)
    assert {task.image for task in tasks if isinstance(task, ImageTask)} == set(images)
    code, proof, err = run(capsys, "verify", "--index", out)
    assert (code, proof["verified"], proof["refused"]) == (1, 0, 3)
    for check in proof["tasks"]:
        assert any(f"needs the container image {image}" in check["refused"] for image in images)
        assert "\n" not in check["refused"] and not check["flips"]
    cli.main(["tasks", "verify", "--index", str(out)])
    assert capsys.readouterr().out.count("refused: ") == 3
    assert run(capsys, "stats", "--index", out)[1]["source"] == {"imported": 3}
    empty = rows(tmp_path / "empty.patch", "")
    code, _, err = run(capsys, "judge", out / "acme__calc-7", empty)
    assert code == 2 and "needs the container image" in err.splitlines()[-1]

    # nothing that the agent's container is built from tells tests or answer
    for task in tasks:
        seen = "".join(p.read_text() for p in (out / task.name / "environment").iterdir())
        assert "test_two" not in seen + task.instruction
    assert "return sum(numbers)" in (out / "acme__calc-7/solution/gold.patch").read_text()
    hides = (out / f"calc-{fixed[:12]}/environment/Dockerfile").read_text()
    assert "rm -rf /r2e_tests" in hides
    assert (
        "class TestSum" in (out / f"calc-{fixed[:12]}/tests/files/r2e_tests/test_1.py").read_text()
    )


def test_an_image_with_its_tests_in_it_keeps_neither_the_answer_nor_edited_tests(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _, fixed = repository
    put(folder, {TESTS: NEW_TESTS})
    source = rows(tmp_path / "rows.jsonl", swe_smith(fixed))
    _, answer, _ = run(capsys, "import", source, "--out", tmp_path / "tasks")
    made = tmp_path / "tasks" / answer["tasks"][0]

    def bash(script: str) -> None:
        subprocess.run(["bash", "-ec", script], cwd=folder, check=True)

    copy = tmp_path / "bug.patch"
    shutil.copy(made / "environment/bug.patch", copy)
    command = (made / "environment/Dockerfile").read_text().partition("RUN ")[2]
    bash(command.replace("/tmp/bug.patch", str(copy)))
    assert (folder / MODULE).read_text() == BUGGY and not copy.exists()
    assert git(folder, "status", "--porcelain") == ""
    assert git(folder, "log", "--all", "--format=%s") == "start"

    put(folder, {TESTS: "def test_two():\n    pass\n", MODULE: FIXED})
    git(folder, "commit", "-qam", "all is well")
    script = (made / "tests/test.sh").read_text()
    loop = script[script.index("for path in") : script.index("cp -a")]
    bash(loop)
    assert (folder / TESTS).read_text() == NEW_TESTS and (folder / MODULE).read_text() == FIXED


@pytest.mark.parametrize("image", ["x\nRUN true", "-x", "x y"])
def test_an_images_name_adds_no_line_to_its_dockerfile(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = rows(tmp_path / "rows.jsonl", swe_smith("0" * 40, image_name=image))
    code, _, err = run(capsys, "import", source, "--out", tmp_path / "tasks")
    assert code == 2 and "no container image's name" in err


def test_text_that_utf8_cannot_carry_is_refused_and_such_a_files_name_is_carried(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, buggy, _ = repository
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "three")
    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns(".git"))
    put(tmp_path / "plain", {MODULE: BUGGY})
    good, bad = swe_bench(buggy), swe_bench(buggy, instance_id="b", problem_statement="\ud800")
    source = rows(tmp_path / "rows.jsonl", good, bad)
    for number, tree in enumerate(([], ["--repo-dir", tmp_path / "plain"])):
        out = tmp_path / f"tasks{number}"
        code, answer, _ = run(capsys, "import", source, "--out", out, *tree)
        assert (code, answer["imported"]) == (1, 1)
        assert "UTF-8 cannot carry" in answer["refused"][f"{source}:2"]
        assert [path.name for path in out.iterdir()] == answer["tasks"]
    assert (load_tasks(out)[0].tree().root / os.fsdecode(b"caf\xe9.txt")).read_text() == "x"


def test_a_folder_of_other_repositories_is_no_tree(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, buggy, _ = repository
    shutil.copytree(folder, tmp_path / "r/other")
    source = rows(tmp_path / "rows.jsonl", swe_bench(buggy))
    where = ("--out", tmp_path / "tasks", "--repo-dir", tmp_path / "r")
    code, _, err = run(capsys, "import", source, *where)
    assert code == 2 and "holds no acme__calc" in err
    (tmp_path / "r/other").rename(tmp_path / "r/acme__calc")
    assert run(capsys, "import", source, *where)[0] == 0


BAD = {
    "FAIL_TO_PASS is missing": {"FAIL_TO_PASS": None},
    "FAIL_TO_PASS is empty": {"FAIL_TO_PASS": "[]"},
    "FAIL_TO_PASS is not a list": {"FAIL_TO_PASS": "[oops"},
    "PASS_TO_PASS is missing": {"PASS_TO_PASS": [1]},
    "base_commit is not a commit": {"base_commit": "--upload-pack=x"},
    "problem_statement is missing": {"problem_statement": ""},
    "repo is missing": {"repo": None},
    "patch: patch, line 1": {"patch": "not a diff"},
    "test_patch: patch path": {"test_patch": diff("a", "", "x\n").replace("/a", "/../a")},
    "names no test of this tree": {"FAIL_TO_PASS": ["tests/other.py::test_two"]},
    "patch: patch does not apply": {"patch": diff(MODULE, "other\n", "more\n")},
    "changes no Python source": {"patch": diff("README", "", "words\n")},
    "no commit": {"base_commit": "0" * 40},
}


def test_bad_rows_are_refused_one_by_one(
    repository: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, buggy, _ = repository
    bad = [swe_bench(buggy, instance_id=f"bad-{n}", **c) for n, c in enumerate(BAD.values())]
    good = swe_bench(buggy)
    source = rows(tmp_path / "rows.jsonl", good, *bad, "{not json", good, "[]", {})
    arguments = ("import", source, "--format", "swe-bench", "--out", tmp_path / "tasks")
    code, answer, err = run(capsys, *arguments, "--repo-dir", folder)
    assert (code, answer["imported"]) == (1, 1)
    for line, why in enumerate(BAD, start=2):
        told = answer["refused"][f"{source}:{line}"]
        assert why in told or (why == "no commit" and "git ls-tree" in told), (why, told)
        assert f"{source}:{line}: refused: " in err
    last = len(BAD) + 2
    assert "not a JSON object" in answer["refused"][f"{source}:{last}"]
    assert "a second task of the name" in answer["refused"][f"{source}:{last + 1}"]
    assert len(answer["refused"]) == len(BAD) + 4
    # nothing half-written
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["acme__calc-7"]


def test_what_it_is_must_be_unmistakable(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = rows(tmp_path / "rows.jsonl", {"question": "?"})
    code, _, err = run(capsys, "import", source, "--out", tmp_path / "tasks")
    assert code == 2 and "of which format is it?" in err
    assert not (tmp_path / "tasks").exists()


def test_a_commit_is_read_as_git_has_it(repository: tuple[Path, str, str]) -> None:
    folder, buggy, fixed = repository
    put(folder, {"untracked.py": "", MODULE: "changed\n"})
    (folder / "link").symlink_to("/etc/passwd")
    tree = read_commit(folder, fixed[:10])
    assert tree[MODULE] == FIXED.encode() and read_commit(folder, buggy)[MODULE] == BUGGY.encode()
    assert TESTS in tree  # though an attribute says not to export it
    assert "untracked.py" not in tree
    assert read_folder(folder)[MODULE] == b"changed\n"
    assert not any(path.startswith((".git/", "link")) for path in read_folder(folder))


def test_names_of_tests_in_other_runners_words() -> None:
    source = b"class TestA:\n    def test_x(self):\n        pass\n\n\ndef test_y():\n    pass\n"
    files = {"tests/admin/tests.py": source, "pkg/test_b.py": source}
    brought = ["pkg/test_b.py"]
    names = {
        "pkg/test_b.py::test_y[a::b]": "pkg/test_b.py::test_y[a::b]",
        "test_x (admin.tests.TestA)": "tests/admin/tests.py::TestA::test_x",
        "test_x (admin.tests.TestA.test_x)": "tests/admin/tests.py::TestA::test_x",
        "test_y": "pkg/test_b.py::test_y",
        "TestA.test_x[1.5]": "pkg/test_b.py::TestA::test_x[1.5]",
    }
    assert [pytest_ids([name], files, brought)[0] for name in names] == list(names.values())


# -- the verdict in the image


GRADED = {
    "pytest": (
        "PASSED tests/t.py::test_a\nFAILED tests/t.py::test_b - assert 1 == 2\n"
        "PASSED tests/t.py::test_c[x - y]\nXFAIL tests/t.py::test_d - why\n",
        {"tests/t.py::test_a": 1, "tests/t.py::test_c[x - y]": 1, "test_a": 1, "test_d": 1}
        | {"tests/t.py::test_b": 0, "tests/t.py::test_z": 0},
    ),
    "django": (
        "test_a (admin.tests.A) ... ok\ntest_b (admin.tests.A)\nWords. ... FAIL\n"
        "test_c (admin.tests.A) ... FAIL\n",
        {"test_a (admin.tests.A)": 1, "test_c (admin.tests.A)": 0, "test_b (admin.tests.A)": 0},
    ),
    "sympy": ("test_a ok\ntest_b F\n", {"test_a": 1, "test_b": 0}),
}


@pytest.mark.parametrize("runner", GRADED)
def test_grades_are_read_from_what_runners_print(runner: str, tmp_path: Path) -> None:
    output, wanted = GRADED[runner]
    (tmp_path / "out.txt").write_text(output)
    grade = Path("sandbox/index/harbor-image/grade.py").resolve()
    for test, good in wanted.items():
        facts = {"fail_to_pass": [test], "pass_to_pass": []}
        (tmp_path / "tests.json").write_text(json.dumps(facts))
        command = [sys.executable, "-I", str(grade), "out.txt", "tests.json"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert ended.returncode == 1 - good, test


def test_the_command_is_that_of_the_repository(repository: tuple[Path, str, str]) -> None:
    from sandbox.importers.swe_bench import read

    _, buggy, _ = repository
    calc = read(swe_bench(buggy))
    assert command_of(calc) == f"python -m pytest -rA -p no:cacheprovider {TESTS}"
    django = read(
        swe_bench(
            buggy,
            repo="django/django",
            test_patch=diff("tests/admin/tests.py", "", "x = 1\n"),
            FAIL_TO_PASS=["test_x (admin.tests.A)"],
        )
    )
    assert command_of(django).startswith("./tests/runtests.py ")
    assert command_of(django).endswith(" admin.tests")


# -- QuixBugs


@pytest.fixture
def quixbugs(tmp_path: Path) -> Path:
    """Three programs in QuixBugs' shape: one wrong, one without end, one whose bug no test sees."""
    folder = tmp_path / "quixbugs"
    words = '\n\n"""\nAdd one.\n"""\n'
    test = (
        "import pytest\nfrom load_testdata import load_json_testcases\n\n"
        "if pytest.use_correct:\n    from correct_python_programs.NAME import NAME\n"
        "else:\n    from python_programs.NAME import NAME\n\n\n"
        "testdata = load_json_testcases(NAME.__name__)\n\n\n"
        '@pytest.mark.parametrize("input_data,expected", testdata)\n'
        "def test_NAME(input_data, expected):\n    assert NAME(*input_data) == expected\n"
    )
    loads = (
        "import json\nfrom pathlib import Path\n\n\ndef load_json_testcases(name):\n"
        '    path = Path(__file__).parent / f"../json_testcases/{name}.json"\n'
        "    return [json.loads(line) for line in path.read_text().splitlines()]\n"
    )
    programs = {
        "one": ("def one(n):\n    return n or 1\n", "def one(n):\n    return n + 1\n"),
        "down": (
            "def down(n):\n    while n:\n        n = n\n    return n\n",
            "def down(n):\n    while n:\n        n -= 1\n    return n\n",
        ),
        "same": ("def same(n):\n    return n * 1\n", "def same(n):\n    return n\n"),
    }
    data = {"one": "[[0], 1]\n[[1], 2]\n", "down": "[[0], 0]\n[[3], 0]\n", "same": "[[2], 2]\n"}
    for name, (buggy, right) in programs.items():
        put(
            folder,
            {
                f"python_programs/{name}.py": f"\n{buggy}{words}",
                f"correct_python_programs/{name}.py": f"\n{right}",
                f"python_testcases/test_{name}.py": test.replace("NAME", name),
                f"json_testcases/{name}.json": data[name],
            },
        )
    put(folder, {"python_testcases/load_testdata.py": loads, "conftest.py": "1 / 0\n"})
    return folder


def test_quixbugs_is_found_out_by_running_it(
    quixbugs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = importer.CONFTEST.replace("LIMIT_S = 1.0", "LIMIT_S = 0.3")
    monkeypatch.setattr(importer, "CONFTEST", quick)
    out = tmp_path / "tasks"
    code, answer, _ = run(capsys, "import", quixbugs, "--out", out)
    assert (code, answer["format"], answer["imported"]) == (1, "quixbugs", 2)
    assert "no test tells bug from fix" in answer["refused"]["same"]
    tasks = {task.name: task for task in load_tasks(out)}
    endless, wrong = tasks["quixbugs-down"], tasks["quixbugs-one"]
    assert len(endless.fail_to_pass) == 1 and len(endless.pass_to_pass) == 1
    assert (wrong.function, wrong.module) == ("one", "python_programs/one.py")
    # the words that say what it should do stay, and what is put right lies nowhere else
    assert (
        wrong.gold_patch.count("\n+") == 2
        and "Add one." in (wrong.tree().root / wrong.module).read_text()
    )
    assert not (wrong.tree().root / "correct_python_programs").exists()
    code, proof, _ = run(capsys, "verify", "--index", out)
    assert (code, proof["verified"], proof["failed"]) == (0, 2, 0)


# -- Harbor

TOML = """\
schema_version = "1.4"

[task]
name = "acme/hello"

[metadata]
difficulty = "easy"

[environment]
build_timeout_sec = 600.0
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign" / "hello"
    put(
        folder,
        {
            "task.toml": TOML,
            "instruction.md": "Write hello.txt.\n",
            "environment/Dockerfile": "FROM ubuntu:24.04\nWORKDIR /app\n",
            "tests/test.sh": "#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n",
            "solution/solve.sh": "#!/bin/bash\necho hello > hello.txt\n",
            "README.md": "kept\n",
        },
    )
    (folder / "tests/test.sh").chmod(0o755)
    return folder


def test_a_foreign_harbor_task_is_kept_as_it_is(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "tasks"
    code, answer, _ = run(capsys, "import", foreign.parent, "--out", out)
    assert (code, answer["format"], answer["tasks"]) == (0, "harbor", ["hello"])
    before, after = (read_folder(folder) for folder in (foreign, out / "hello"))
    assert after.pop("task.toml").startswith(before.pop("task.toml").rstrip())
    assert before == after and (out / "hello/tests/test.sh").stat().st_mode & 0o111
    (task,) = load_tasks(out)
    assert isinstance(task, ImageTask)
    assert (task.image, task.package) == ("environment/Dockerfile", "acme")
    code, proof, _ = run(capsys, "verify", "--index", out)
    assert (code, proof["refused"]) == (1, 1)
    # ours comes back as ours
    again = tmp_path / "again"
    assert run(capsys, "import", out / "hello", "--out", again)[0] == 0
    assert Task.load(again / "hello").digest == task.digest


def test_a_foreign_task_of_several_steps_tells_them_in_order(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (foreign / "instruction.md").unlink()
    shutil.rmtree(foreign / "tests")
    put(foreign, {"task.toml": TOML + "\n[[steps]]\nname = 'b'\n\n[[steps]]\nname = 'a'\n"})
    for step in ("a", "b"):
        put(foreign, {f"steps/{step}/instruction.md": f"Do {step}."})
        put(foreign, {f"steps/{step}/tests/test.sh": "exit 0\n"})
    out = tmp_path / "tasks"
    assert run(capsys, "import", foreign, "--out", out)[0] == 0
    assert Task.load(out / "hello").instruction == "Do b.\n\nDo a."
    (foreign / "steps/b/instruction.md").unlink()
    code, _, err = run(capsys, "import", foreign, "--out", tmp_path / "none")
    assert code == 2 and "steps/b/instruction.md cannot be read" in err


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: (f / "tests/test.sh").unlink(), "tests/test.sh is missing"),
        (lambda f: (f / "instruction.md").unlink(), "instruction.md"),
        (lambda f: (f / "instruction.md").write_text(" \n"), "instruction.md is empty"),
        (lambda f: (f / "environment/Dockerfile").unlink(), "environment/Dockerfile"),
        (lambda f: (f / "task.toml").write_text("a = [\n"), "task.toml"),
        (lambda f: (f / "task.toml").write_text(TOML.replace("acme/", "")), "ORGANISATION/NAME"),
        (lambda f: (f / "task.toml").write_text("metadata = {a = 1}\n"), "takes no"),
        (lambda f: (f / "task.toml").write_text("steps = 3\n" + TOML), "steps is no list"),
        (lambda f: (f / "tests/x").symlink_to("/etc/passwd"), "neither a file nor a folder"),
    ],
)
def test_what_harbor_would_not_run_is_refused(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: Callable, why: str
) -> None:
    shutil.copytree(foreign, foreign.parent / "good")
    put(foreign.parent / "good", {"task.toml": TOML.replace("hello", "good")})
    damage(foreign)
    out = tmp_path / "tasks"
    code, answer, _ = run(capsys, "import", foreign.parent, "--out", out)
    assert (code, answer["imported"]) == (1, 1)
    assert why in answer["refused"][str(foreign)]
    assert [path.name for path in out.iterdir()] == ["good"]
