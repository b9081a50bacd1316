"""Harbor's own loader reads our task directories; `REMEND_HARBOR_PYTHON` has that library."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.sandbox.test_importers import r2e, rows, swe_bench, swe_smith
from tools import cli

PYTHON = os.environ.get("REMEND_HARBOR_PYTHON")
LOAD = """
import json, sys
from pathlib import Path
from harbor.models.task.task import Task
tasks = [Task(Path(folder)) for folder in sys.argv[1:]]
print(json.dumps({task.name: task.instruction for task in tasks}))
"""


def load(folders: list[Path]) -> dict[str, str]:
    """Instructions by name, as Harbor reads them."""
    command = [str(PYTHON), "-c", LOAD, *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.service
@pytest.mark.skipif(not PYTHON, reason="REMEND_HARBOR_PYTHON names no Python with harbor")
def test_harbor_accepts_what_we_import_for_images(tmp_path: Path) -> None:
    commits = "a" * 40, "b" * 40
    found = {"bench": swe_bench(commits[0]), "smith": swe_smith(commits[1]), "r2e": r2e(*commits)}
    for name, row in found.items():
        source = rows(tmp_path / f"{name}.jsonl", row)
        assert cli.main(["tasks", "import", str(source), "--out", str(tmp_path / "tasks")]) == 0
    assert len(load(sorted((tmp_path / "tasks").iterdir()))) == 3


@pytest.mark.service
@pytest.mark.network
@pytest.mark.skipif(not PYTHON, reason="REMEND_HARBOR_PYTHON names no Python with harbor")
@pytest.mark.parametrize("index", ["shipped", "releases"])
def test_harbor_accepts_what_we_export(index: str, tmp_path: Path) -> None:
    rebuild = ["tasks", "rebuild", "--index", index, "--limit", "20", "--out", str(tmp_path)]
    assert cli.main([*rebuild]) == 0
    folders = sorted(tmp_path.iterdir())
    read = load(folders)
    assert set(read) == {f"remend/{folder.name}" for folder in folders}
    for folder in folders:
        told = read[f"remend/{folder.name}"].strip()
        assert told == (folder / "instruction.md").read_text().strip()
