"""Procedural tasks from a list of packages, and the card of what was made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from configs.errors import InputError
from configs.files import read_jsonl, write_jsonl
from sandbox.candidates import Candidate, Dated, write_candidates
from sandbox.shipped import Made
from sandbox.task_index import read_index
from tests.sandbox.releases import sdist
from tools import cli
from tools.card import leakage

SHARED = '''

def shared(value, most):
    """Said otherwise in each package, and the same code."""
    if value > most:
        return most - 1
    return value + 1
'''
OWN = """def {name}(items, least):
    total = {start}
    for item in items:
        if item >= least:
            total += item
    return total
"""
TESTS = """from {package} import {name}, shared


def test_own():
    assert {name}([1, 2, 3], 2) == 5 + {start}


def test_shared():
    assert shared(3, 2) == 1 and shared(2, 2) == 3 and shared(0, 2) == 1
"""


def release(home: Path, package: str, name: str, start: int) -> Dated:
    """One release of a small package in the index `home`."""
    files = {
        f"{package}.py": OWN.format(name=name, start=start) + SHARED,
        f"tests/test_{package}.py": TESTS.format(package=package, name=name, start=start),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {package}\nLicense-Expression: MIT\n",
    }
    data = sdist(files, f"{package}-1.0")
    archive, sha256 = f"{package}-1.0.tar.gz", hashlib.sha256(data).hexdigest()
    (home / package).mkdir(parents=True)
    (home / package / archive).write_bytes(data)
    (home / package / "index.html").write_text(f'<a href="{archive}#sha256={sha256}">x</a>')
    return Dated("1.0", sha256, "2020-05-05")


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list with a package of each split and one that is not to be had."""
    home = tmp_path / "index"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", home.as_uri())
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    learnt, asked = release(home, "learnt", "gather", 1), release(home, "asked", "collect", 0)
    tampered = Dated("1.0", "0" * 64, "2020-05-05")
    release(home, "tampered", "pick", 2)
    packages = [
        Candidate("learnt", "train", (learnt,)),
        Candidate("asked", "heldout", (asked,)),
        Candidate("tampered", "train", (tampered,)),
    ]
    write_candidates(tmp_path / "list.jsonl", packages)
    return tmp_path / "list.jsonl"


def test_tasks_of_a_list_are_proven_and_described(
    listing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    making = ["tasks", "mutate", "--packages-from", str(listing), "--out", str(out), "--jobs", "2"]
    assert cli.main([*making, "--limit", "2", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["package"].keys() == {"learnt", "asked"}
    (refused,) = [json.loads(f.read_text()) for f in (out / "found").glob("tampered-*.json")]
    assert refused["package"] is None and "1.0" in refused["refused"]

    rows = read_jsonl(out / "tasks.jsonl")
    assert len(rows) == counts["tasks"] == 4
    # the same code is in the held-out package: nothing of the train split is about it
    assert {row["function"] for row in rows if row["split"] == "train"} == {"gather"}
    assert all(row["source"] == "procedural" and row["licence"] == "MIT" for row in rows)
    shutil.rmtree(tmp_path / "index")  # what was found is kept: no index is asked again
    assert cli.main([*making, "--limit", "2", "--json"]) == 0
    assert read_jsonl(out / "tasks.jsonl") == rows
    index = str(out / "tasks.jsonl")
    assert cli.main(["tasks", "verify", "--index", index, "--json"]) == 0

    card = tmp_path / "CARD.md"
    assert cli.main(["tasks", "card", "--index", index, "--out", str(card)]) == 0
    text = card.read_text()
    assert "4 repair tasks" in text and "| asked | heldout | MIT | 1 | 2 | 0 |" in text
    plots = sorted((tmp_path / "CARD-plots").glob("*.svg"))
    assert f"CARD-plots/{plots[0].name}" in text
    for plot in plots:
        ElementTree.fromstring(plot.read_text())

    held = [row for row in rows if row["split"] == "heldout"]
    write_jsonl(tmp_path / "both.jsonl", held + [row | {"split": "train"} for row in held])
    lines = read_index(tmp_path / "both.jsonl")
    homes = {"asked": [line.release for line in lines if isinstance(line, Made)]}
    found = leakage(lines, homes)["counts"]
    assert found["packages"] == found["files"] == 1 and found["tasks"] == len(held)
    assert found["functions"] == 2 and found["functions that tasks of both are about"] >= 1


def test_what_is_not_listed_is_refused(listing: Path, tmp_path: Path) -> None:
    out = ["--packages-from", str(listing), "--out", str(tmp_path / "out")]
    assert cli.main(["tasks", "mutate", *out, "--packages", "absent"]) == 2
    assert cli.main(["tasks", "mutate", *out, "--packages", "tampered", "--count", "0"]) == 2
    assert cli.main(["tasks", "mutate", "--packages-from", "nowhere", "--out", "x"]) == 2


def test_a_card_of_no_tasks_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "none.jsonl", [])
    with pytest.raises(InputError, match="no tasks"):
        from tools.tasks import main

        main(["card", "--index", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "c.md")])
