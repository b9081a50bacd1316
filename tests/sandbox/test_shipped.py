"""The shipped index: what it holds, that it is what it says, and that damage is noticed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.files import write_jsonl
from sandbox.generate import fingerprints_of
from sandbox.packages import fetch, load_packages
from sandbox.shipped import SHIPPED, Row, group, ungroup
from sandbox.task import Task, load_tasks
from sandbox.task_index import read_index
from tools import cli


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [line for line in read_index("shipped") if isinstance(line, Row)]


def have(packages: set[str]) -> None:
    """Fetch releases into the cache that is in use, or skip the test if there is no network."""
    try:
        fetch([load_packages()[name] for name in packages])
    except InputError as error:
        if "could not reach" in str(error):
            pytest.skip(str(error))
        raise


def test_sizes_and_balance(rows: list[Row]) -> None:
    by_split = {s: [row for row in rows if row.split == s] for s in ("train", "heldout")}
    assert len(by_split["train"]) >= 500 and len(by_split["heldout"]) >= 160
    packages = {split: {row.package for row in some} for split, some in by_split.items()}
    assert len(packages["train"]) >= 10 and len(packages["heldout"]) >= 6
    assert not packages["train"] & packages["heldout"]
    for some in by_split.values():
        assert max(Counter(row.operator for row in some).values()) <= 0.2 * len(some)
    assert max(Counter((row.module, row.function) for row in rows).values()) <= 4


def test_every_line_is_facts_only(rows: list[Row]) -> None:
    assert len({row.name for row in rows}) == len({row.sha256 for row in rows}) == len(rows)
    for row in rows:
        package = load_packages()[row.package]
        assert (package.version, package.split) == (row.version, row.split)
        assert row.repeat >= 3 and row.seconds <= 0.5
        assert 1 <= len(ungroup(row.f2p)) <= 12 and len(ungroup(row.p2p)) <= 16
        assert not set(ungroup(row.f2p)) & set(ungroup(row.p2p))
    assert SHIPPED.stat().st_size < 2_000 * len(rows)


def test_ids_are_grouped_and_come_back() -> None:
    ids = ("a.py::t1", "a.py::C::t2[x::y]", "b.py::t1")
    assert group(ids) == {"a.py": ["t1", "C::t2[x::y]"], "b.py": ["t1"]}
    assert ungroup(group(ids)) == ids


@pytest.mark.parametrize(
    "change",
    [
        {"ordinal": "3"},
        {"sha256": None},
        {"extra": 1},
        {"f2p": ["a.py::t"]},
        {"f2p": {"a.py": "t"}},
    ],
)
def test_a_damaged_line_is_named(
    rows: list[Row], tmp_path: Path, change: dict, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "index.jsonl"
    write_jsonl(path, [rows[0].record(), {**rows[1].record(), **change}])
    assert cli.main(["tasks", "stats", "--index", str(path)]) == 2
    assert f"{path}:2:" in capsys.readouterr().err


@pytest.mark.network
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "make the index again"),
        ({"ordinal": 10_000}, "make the index again"),
        ({"ordinal": -1}, "make the index again"),
        ({"operator": "none"}, "make the index again"),
        ({"function": "none"}, "no function"),
        ({"module": "../../../etc/passwd"}, "has no file"),
        ({"version": "0"}, "not in the packages"),
        ({"package": "unknown"}, "not in the packages"),
    ],
)
def test_a_tampered_line_makes_no_task(
    rows: list[Row], tmp_path: Path, change: dict, message: str
) -> None:
    row = next(row for row in rows if row.package == "inflection")
    have({row.package})
    write_jsonl(tmp_path / "index.jsonl", [{**row.record(), **change}])
    with pytest.raises(InputError, match=message):
        load_tasks(tmp_path / "index.jsonl")


@pytest.mark.network
def test_a_sample_is_made_kept_verified_and_rebuilt(
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    some = [row for row in rows if row.package in ("inflection", "xmltodict")][::9]
    have({row.package for row in some})
    index = tmp_path / "index.jsonl"
    write_jsonl(index, [row.record() for row in some])
    made = load_tasks(index)
    assert [task.name for task in made] == [row.name for row in some]
    assert load_tasks(index) == made  # the second time from the cache's directories
    assert load_tasks(index, split="train", limit=1) == [t for t in made if t.split == "train"][:1]
    assert cli.main(["tasks", "verify", "--index", str(index), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == len(some)
    out = tmp_path / "harbor"
    assert cli.main(["tasks", "rebuild", "--index", str(index), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == len(some)
    assert sorted(made, key=lambda t: t.name) == [Task.load(p) for p in sorted(out.iterdir())]
    assert cli.main(["tasks", "rebuild", "--index", str(index), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.network
def test_no_function_is_both_trained_on_and_held_out(rows: list[Row]) -> None:
    have({row.package for row in rows})
    prints: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for module in {(row.split, row.package, row.module) for row in rows}:
        split, package, path = module
        named = {row.function for row in rows if (row.split, row.package, row.module) == module}
        known = fingerprints_of((load_packages()[package].tree / path).read_text("utf-8"))
        prints[split] |= {known[name] for name in named}
    assert prints["train"] and not prints["train"] & prints["heldout"]


def test_stats_counts_the_shipped_tasks(rows: list[Row], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tasks", "stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    real = len(read_index("releases"))
    assert stats["tasks"] == len(rows) + real
    assert stats["source"] == {"procedural": len(rows), "release": real}
    assert cli.main(["tasks", "stats", "--index", "shipped", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert sum(stats["package"].values()) == sum(stats["split"].values()) == len(rows)


def test_an_unknown_task_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tasks", "judge", "no-such-task", "-"]) == 2
    assert "no-such-task" in capsys.readouterr().err
    assert cli.main(["tasks", "verify", "--index", str(tmp_path)]) == 2
    assert "no task directories" in capsys.readouterr().err
    assert cli.main(["tasks", "verify", "--repeat", "0"]) == 2
    assert "--repeat" in capsys.readouterr().err
