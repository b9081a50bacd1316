"""Mining real bugs: two releases of a small package, with every trap that the miner must see."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.files import read_jsonl, write_jsonl
from sandbox.base import TestCase
from sandbox.candidates import Candidate, Dated, pairs, read_candidates, write_candidates
from sandbox.changelog import notes
from sandbox.failures import kind
from sandbox.hunks import Hunk, digest, hunks_between, take_back
from sandbox.mined import Mined
from sandbox.needs import imported_by_tests
from sandbox.packages import load_packages
from sandbox.split import ddmin, same_tests, split
from sandbox.task_index import read_index
from tests.sandbox.releases import sdist
from tools import cli

OLD = '''"""Numbers."""

__version__ = "1.0"


def double(x):
    return x + 2


def first(items):
    # the first of them
    return items[1]


def half(x):
    return x // 2


def third(x):
    return x / 3
'''
NEW = (
    OLD.replace('"1.0"', '"1.1"')
    .replace("x + 2", "2 * x")
    .replace("items[1]", "items[0]")
    .replace("# the first of them", "# the first one")
    + "\n\ndef fresh():\n    return 1\n"
)
TESTS = """import socket
import mini


def test_double():
    assert mini.double(5) == 10


def test_first():
    assert mini.first([7, 8]) == 7


def test_half():
    assert mini.half(4) == 2


def test_third():
    assert mini.third(9) == 3


def test_new_name():
    assert mini.fresh() == 1


def test_version():
    assert mini.__version__ == "1.1"


def test_network():
    socket.create_connection(("example.org", 80), 1)


state = []


def test_leaks():
    state.append(mini.double(5))


def test_leaked_upon():
    assert state in ([], [10])
"""
CHANGES = "Changes\n=======\n\n1.1 (2020-05-05)\n-------\n- double() doubles\n\n1.0\n---\n- new\n"
META = "Metadata-Version: 2.1\nName: mini\nLicense-Expression: MIT\n"


def archives(home: Path, old: str = OLD, new: str = NEW, tests: str = TESTS) -> list[Dated]:
    """Two releases in an index of its own."""
    page = home / "mini" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    found, links = [], []
    for version, source in (("1.0", old), ("1.1", new)):
        files = {
            "mini.py": source,
            "tests/test_mini.py": tests if version == "1.1" else "def test_it():\n    pass\n",
            "CHANGES.rst": CHANGES,
            "PKG-INFO": f"{META}Version: {version}\n",
        }
        data = sdist(files, f"mini-{version}")
        name = f"mini-{version}.tar.gz"
        (page.parent / name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        links.append(f'<a href="{name}#sha256={sha256}">{name}</a>')
        found.append(Dated(version, sha256, "2020-05-05"))
    page.write_text("".join(links))
    return found


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of one package, and the only index there is."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    releases = archives(tmp_path / "index")
    write_candidates(tmp_path / "list.jsonl", [Candidate("mini", "train", tuple(releases))])
    return tmp_path / "list.jsonl"


def mine(listing: Path, out: Path) -> dict:
    assert (
        cli.main(["tasks", "mine", "--list", str(listing), "--out", str(out), "--jobs", "1"]) == 0
    )
    (record,) = [json.loads(file.read_text()) for file in (out / "pairs").glob("*.json")]
    return record


def test_two_bugs_are_told_apart_and_the_traps_are_not_fallen_into(
    listing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = mine(listing, tmp_path / "out")
    assert record["status"] == "tasks", record
    assert record["kinds"] == {"bug": 3, "api": 1}  # the version stays the newer
    rows = read_jsonl(tmp_path / "out" / "tasks.jsonl")
    by_function = {row["function"]: row for row in rows if row["operator"] == "fix"}
    assert set(by_function) == {"double", "first"}
    assert by_function["first"]["f2p"] == {"tests/test_mini.py": ["test_first"]}
    # alone it passes on the older source: it fails only when another test has run
    assert by_function["double"]["f2p"] == {"tests/test_mini.py": ["test_double"]}
    assert "test_leaked_upon" in " ".join(record["dropped"])
    for row in rows:
        assert row["source"] == "release" and row["licence"] == "MIT" and row["repeat"] == 3
        assert "network" not in json.dumps(row["p2p"])
        assert "2 * x" not in json.dumps(row)  # facts, no source
    capsys.readouterr()

    index = str(tmp_path / "out" / "tasks.jsonl")
    verify = ["tasks", "verify", "--index", index, "--repeat", "3", "--json"]
    assert cli.main([*verify, "--keep", str(tmp_path / "kept.jsonl")]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["verified"] == len(rows) and checked["verdicts"] == 6 * len(rows)
    assert read_jsonl(tmp_path / "kept.jsonl") == rows

    digests = []
    for out in ("a", "b"):  # the second time from a fresh cache
        if out == "b":
            (tmp_path / "cache").rename(tmp_path / "cache-of-a")
        rebuild = ["tasks", "rebuild", "--index", index, "--out", str(tmp_path / out), "--json"]
        assert cli.main(rebuild) == 0
        digests.append(json.loads(capsys.readouterr().out)["digests"])
    assert digests[0] == digests[1]
    told = (tmp_path / "a" / by_function["double"]["name"] / "instruction.md").read_text()
    assert "double() doubles" in told and "2 * x" not in told
    assert cli.main(["tasks", "stats", "--index", index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == {"release": len(rows)}


SHAPES_OLD = """def area(w, h):
    return w + h


def volume(w, h, d):
    return w + h + d


def edge(x):
    return x + 1
"""
SHAPES_NEW = """def _times(*all):
    product = 1
    for x in all:
        product *= x
    return product


def area(w, h):
    return _times(w, h)


def volume(w, h, d):
    return _times(w, h, d)


def edge(x):
    return x
"""
SHAPES_TESTS = """import datetime
import mini
import pytest


def test_area():
    assert mini.area(3, 5) == 15


def test_volume():
    assert mini.volume(2, 3, 5) == 30


def test_small():
    assert mini.area(2, 2) == 4


def test_edge():
    assert mini.edge(3) == 3


@pytest.mark.parametrize("now", [str(datetime.datetime.now())])
def test_another_name_each_time(now):
    assert mini.area(2, 2) == 4
"""


def test_a_piece_takes_along_what_cannot_stay_without_it(listing: Path, tmp_path: Path) -> None:
    """`_times` alone cannot go: `area` calls it, and the older release has a sum that works."""
    releases = archives(tmp_path / "index", SHAPES_OLD, SHAPES_NEW, SHAPES_TESTS)
    write_candidates(listing, [Candidate("mini", "train", tuple(releases))])
    record = mine(listing, tmp_path / "out")
    assert record["status"] == "tasks" and record["passing"] == 5, record
    told = {
        (row["operator"], sum(map(len, row["hunks"].values()))): row["f2p"]["tests/test_mini.py"]
        for row in record["tasks"]
    }
    assert told == {
        ("fix", 1): ["test_edge"],
        ("fix", 3): ["test_area", "test_volume"],
        ("release", 4): ["test_area", "test_edge", "test_volume"],
    }


def test_what_tests_import_and_settings_name_is_wanted(tmp_path: Path) -> None:
    files = {
        "src/mini/__init__.py": "import requests\n",
        "tests/helper.py": "",
        "tests/test_a.py": "import os, yaml, helper, mini, unheard_of\nfrom dateutil import tz\n",
        "tests/sub/test_b.py": "def test_it():\n    import pytest_mock\n",
        "tests/test_c.py": "not python",
        "tox.ini": "deps =\n  pyyaml>=5\n  pytest_mock\n",
        "setup.py": "setup(tests_require=['python-dateutil', 'requests', 'os'])",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    wanted = imported_by_tests(tmp_path, ["tests"])
    assert wanted == ["pytest-mock", "python-dateutil", "pyyaml"]


def test_pieces_that_the_same_tests_tell_are_one() -> None:
    a, b, c, d, e = (Hunk("a.py", (i, i + 1 + i // 4), (i, i + 1)) for i in range(5))
    pieces = [((a,), {"x"}), ((b,), {"x", "y"}), ((c,), {"x"}), ((d,), {"x"}), ((e,), {"x"})]
    assert same_tests(pieces) == [((a, c, d, e), (e,), (a,)), ((b,),)]


def test_a_mined_pair_is_not_mined_again(listing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine(listing, out)
    (file,) = (out / "pairs").glob("*.json")
    whole, date = file.read_bytes(), file.stat().st_mtime_ns
    (out / "tasks.jsonl").unlink()
    mine(listing, out)
    assert file.stat().st_mtime_ns == date
    assert read_jsonl(out / "tasks.jsonl")
    # as after a kill in the middle of a pair: nothing is there, or all of it
    file.unlink()
    (out / "pairs" / f".{file.name}.1.tmp").write_bytes(whole[:100])
    again, first = mine(listing, out)["tasks"], json.loads(whole)["tasks"]
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in first]


@pytest.mark.parametrize("how", ["tampered", "missing", "yanked"])
def test_what_cannot_be_had_as_pinned_is_refused_with_the_reason(
    how: str, listing: Path, tmp_path: Path
) -> None:
    page = tmp_path / "index" / "mini" / "index.html"
    if how == "tampered":
        with open(page.parent / "mini-1.1.tar.gz", "ab") as file:
            file.write(b"x")
    elif how == "missing":
        page.write_text(page.read_text().partition("</a>")[0] + "</a>")
    else:
        page.write_text(page.read_text().replace(">mini-1.1", ' data-yanked="bad">mini-1.1'))
    record = mine(listing, tmp_path / "out")
    reason = {
        "tampered": "is pinned",
        "missing": "has no sdist",
        "yanked": "was withdrawn from the index: bad",
    }[how]
    assert record["status"] == "refused" and reason in record["reason"]


def test_a_test_that_needs_the_network_is_refused_with_the_reason(
    listing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(listing, tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "tasks.jsonl")
    rows[0]["p2p"] = {"tests/test_mini.py": ["test_network"]}
    write_jsonl(tmp_path / "bad.jsonl", rows[:1])
    capsys.readouterr()
    assert cli.main(["tasks", "verify", "--index", str(tmp_path / "bad.jsonl"), "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out)["tasks"]
    assert "needs the network" in check["before"] and "needs the network" in check["after"]


def test_a_line_that_does_not_fit_its_releases_is_refused(listing: Path, tmp_path: Path) -> None:
    mine(listing, tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "tasks.jsonl")
    for change in ({"sha256": "0" * 64}, {"hunks": {"mini.py": [[9000, 9001, 1, 2]]}}, {"old": 1}):
        write_jsonl(tmp_path / "bad.jsonl", [rows[0] | change])
        command = ["tasks", "rebuild", "--index", str(tmp_path / "bad.jsonl")]
        assert cli.main([*command, "--out", str(tmp_path / "none")]) == 2


def test_hunks_leave_out_what_does_not_run() -> None:
    new, old = {"a.py": NEW.encode()}, {"a.py": OLD.encode()}
    found = hunks_between(new, old, ("1.1", "1.0"))
    # not the version and not the comment alone; the latter stands beside a change
    assert all("__version__" not in NEW.splitlines()[hunk.new[0]] for hunk in found)
    assert take_back(found, new, old)["a.py"] == OLD.replace('"1.0"', '"1.1"').encode()
    assert digest(take_back(found[:1], new, old)) != digest(take_back(found, new, old))
    with pytest.raises(InputError, match="no lines"):
        take_back([Hunk("a.py", (500, 501), (0, 1))], new, old)


def test_split_finds_single_hunks_and_smallest_sets() -> None:
    hunks = [Hunk("a.py", (i, i + 1), (i, i + 1)) for i in range(12)]
    needed = {"one": {3}, "either": {5}, "both": {2, 9}}

    async def failing(some, tests):
        there = {hunk.new[0] for hunk in some}
        return {test for test in tests if needed[test] <= there}

    found = asyncio.run(split(hunks, hunks, list(needed), failing, 200))
    assert [(tuple(h.new[0] for h in p), t) for p, t in found] == [
        ((3,), {"one"}),
        ((5,), {"either"}),
        ((2, 9), {"both"}),
    ]
    smallest, runs = asyncio.run(ddmin(hunks, "both", failing, 200))
    assert {hunk.new[0] for hunk in smallest} == {2, 9} and runs < 60
    assert asyncio.run(ddmin(hunks, "both", failing, 0)) == (hunks, 0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("AssertionError: assert 1 == 2", "bug"),
        ("AttributeError: 'NoneType' object has no attribute 'x'", "bug"),
        ("TypeError: unsupported operand type(s)", "bug"),
        ("AttributeError: module 'a' has no attribute 'new'", "api"),
        ("TypeError: f() got an unexpected keyword argument 'new'", "api"),
        ("ImportError: cannot import name 'new'", "api"),
        ("AssertionError: assert '1.0' == '1.1'", "version"),
        ("socket.gaierror: [Errno -3] Temporary failure in name resolution", "network"),
    ],
)
def test_kinds_of_failure(error: str, said: str) -> None:
    assert kind(TestCase("t.py::test_a", "failed", error), ("1.1", "1.0")) == said


def test_notes_are_those_of_the_release(tmp_path: Path) -> None:
    (tmp_path / "CHANGES.md").write_text(
        "# Log\n## [2.1](https://x.test/2.0...2.1) (2020-01-01)\n* fixes a\n```\ncode\n```\n"
        "## 2.0\n* older\n"
    )
    assert notes(tmp_path, "2.1") == "* fixes a"
    assert notes(tmp_path, "2.0") == "* older"
    assert notes(tmp_path, "1.9") == ""
    (tmp_path / "README.rst").write_text("Log\n\n- 1.9 fixes b\n  and c\n- 1.8 old\n")
    assert notes(tmp_path, "1.9") == "fixes b\n  and c"


def test_the_shipped_list() -> None:
    candidates = read_candidates()
    assert len(candidates) >= 60 and len(pairs(candidates)) >= 1000
    assert {c.split for c in candidates} == {"train", "heldout"}
    assert all(len(r.sha256) == 64 for c in candidates for r in c.releases)


def test_the_shipped_real_bugs_are_facts_only() -> None:
    lines = read_index("releases")
    assert len(lines) >= 100
    assert len({line.name for line in lines}) == len(lines)
    for line in lines:
        assert isinstance(line, Mined) and line.repeat >= 3 and line.f2p and line.hunks
        assert len(line.old_sha256) == len(line.sdist_sha256) == len(line.sha256) == 64
    splits = {line.package: line.split for line in lines}
    assert all(line.split == splits[line.package] for line in lines)
    assert not any(
        known.split != splits.get(n, known.split) for n, known in load_packages().items()
    )
