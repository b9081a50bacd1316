"""Tasks that go out: as Harbor directories, and as a TFDS dataset that TensorFlow need not read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.importers.carried import carry
from sandbox.patch import make_patch
from sandbox.task import ALWAYS_PROTECTED, Task
from tools import cli

MODULE, TESTS = "src/calc.py", "tests/test_calc.py"
FIXED, BUGGY = b"def one():\n    return 1\n", b"def one():\n    return 2\n"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two task directories, one of each split."""
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    release = carry("calc", "1", {MODULE: FIXED, TESTS: b"def test_one():\n    pass\n"})
    for split in ("train", "heldout"):
        task = Task(
            name=f"calc-{split}",
            source="imported",
            split=split,
            package="calc",
            version=release.version,
            sdist_sha256=release.sha256,
            licence="MIT",
            module=MODULE,
            function="one",
            operator="fix",
            instruction="Größer als \u2028 nichts.",
            fail_to_pass=(f"{TESTS}::test_one",),
            pass_to_pass=(),
            python_path=("src",),
            bug_patch=make_patch({MODULE: FIXED}, {MODULE: BUGGY}),
            protected=ALWAYS_PROTECTED,
            origin="carried",
        )
        task.save(tmp_path / "tasks" / task.name)
    return tmp_path / "tasks"


def test_harbor_directories_are_the_tasks_themselves(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["tasks", "export", "--to", "harbor", "--index", str(tasks), "--out", str(out)]
    assert cli.main(command) == 0
    digests = [{p.name: Task.load(p).digest for p in folder.iterdir()} for folder in (tasks, out)]
    assert digests[0] == digests[1] and len(digests[0]) == 2
    assert cli.main(command) == 2  # nothing is written over


READ = """
import json, sys
import tensorflow_datasets as tfds
found = {}
for split in ("train", "heldout"):
    rows = tfds.data_source("remend_tasks", data_dir=sys.argv[1], split=split)
    found[split] = [
        {
            "name": row["name"].decode(), "patch": row["patch"].decode(),
            "instruction": row["instruction"].decode(), "digest": row["digest"].decode(),
            "tests": [test.decode() for test in row["fail_to_pass"]],
            "none": list(row["pass_to_pass"]), "archive": row["archive"].hex(),
        }
        for row in rows
    ]
assert "tensorflow" not in sys.modules
print(json.dumps(found))
"""


def test_tfds_reads_the_tasks_without_tensorflow(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tensorflow_datasets", reason="remend[datasets] is not installed")
    out = tmp_path / "out"
    command = [
        "tasks",
        "export",
        "--to",
        "tfds",
        "--index",
        str(tasks),
        "--out",
        str(out),
        "--json",
    ]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == 2
    reading = [sys.executable, "-c", READ, str(out)]
    ended = subprocess.run(reading, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for split in ("train", "heldout"):
        (row,), task = found[split], Task.load(tasks / f"calc-{split}")
        assert (row["name"], row["digest"]) == (task.name, task.digest)
        assert (row["instruction"], row["patch"]) == (task.instruction, task.gold_patch)
        assert (row["tests"], row["none"]) == (list(task.fail_to_pass), [])
        archive = hashlib.sha256(bytes.fromhex(row["archive"])).hexdigest()
        assert archive == task.sdist_sha256
    assert cli.main(command) == 2
    assert "is a dataset already" in capsys.readouterr().err
