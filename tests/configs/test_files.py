"""Atomic writes and JSON lines, with writers that die half-way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.files import append_jsonl, read_jsonl, write_atomic, write_jsonl
from configs.paths import cache_dir

RECORDS = st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()))


def test_write_atomic_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "one\n")
    write_atomic(path, "two é\n")
    assert path.read_text(encoding="utf-8") == "two é\n"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


def test_a_writer_that_raises_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"a": 1}])

    def records():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, records())
    assert read_jsonl(path) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_killed_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"old": True}])
    killed = """
import os, sys
from pathlib import Path
from configs.files import write_jsonl
def records():
    for index in range(10_000):
        yield {"index": index}
    os.kill(os.getpid(), 9)
write_jsonl(Path(sys.argv[1]), records())
"""
    done = subprocess.run([sys.executable, "-c", killed, str(path)], cwd=_root())
    assert done.returncode == -9
    assert read_jsonl(path) == [{"old": True}]


@given(records=RECORDS, cut=st.integers(1, 1000))
def test_what_was_appended_whole_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict], cut: int
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "metrics.jsonl"
    for record in records:
        append_jsonl(path, record)
    append_jsonl(path, {"last": "x" * 1000})
    data = path.read_bytes()
    path.write_bytes(data[:-cut])  # the process died inside its last write
    assert read_jsonl(path) == records
    append_jsonl(path, {"after": 1})
    assert read_jsonl(path) == [*records, {"after": 1}]


def test_a_torn_line_longer_than_one_read_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    append_jsonl(path, {"a": 1})
    with open(path, "ab") as file:
        file.write(b'{"torn": "' + b"x" * 200_000)
    append_jsonl(path, {"a": 2})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_undecodable_output_survives(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = b"\xff ok".decode("utf-8", "surrogateescape")
    append_jsonl(path, {"text": text})
    assert read_jsonl(path) == [{"text": text}]


@pytest.mark.parametrize("bad", ["{]", "[1]", "", "\x00\x00"])
def test_a_corrupt_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(InputError, match=r"data\.jsonl:2: not a JSON object"):
        read_jsonl(path)


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read .*nowhere"):
        read_jsonl(tmp_path / "nowhere")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c"
    monkeypatch.setenv("REMEND_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "remend"


def _root() -> Path:
    return Path(__file__).resolve().parents[2]
