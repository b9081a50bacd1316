"""Every host plans the same rows, and reads no more trajectories than its part and its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import InputError
from sft import examples
from sft.examples import Examples
from sft.trajectory import ENVIRONMENT, POLICY, Stored, Trajectory, load, save

COUNT = 23


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    made = []
    for i in range(COUNT):
        verdict = {"verdict": "pass" if rng.random() < 0.7 else "fail"}
        one = Trajectory(f"t{i}", "p", "o", "train", "teacher", i, -1, "", verdict=verdict)
        one.add(rng.integers(0, 99, rng.integers(2, 9)).tolist(), ENVIRONMENT)
        one.add(rng.integers(0, 99, rng.integers(2, 9)).tolist(), POLICY)
        made.append(one)
    save(tmp_path / "made.jsonl", made)
    return tmp_path / "made.jsonl"


def test_a_stored_file_is_what_load_gives(path: Path) -> None:
    stored = Stored(path)
    assert list(stored) == load(path) and stored[-1] == load(path)[-1]
    assert stored[3:7] == load(path)[3:7]
    with pytest.raises(IndexError):
        stored[COUNT]
    path.write_bytes(path.read_bytes() + b"{}\n" + b'{"task":')  # a torn line at the end is none
    assert len(Stored(path)) == COUNT + 1
    with pytest.raises(InputError, match=rf"{path.name}:{COUNT + 1}: not a trajectory"):
        Stored(path)[COUNT]


class Counted(Stored):
    """How often a trajectory was read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        self.reads += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_every_host_knows_all_sizes_and_has_read_its_part(
    path: Path, monkeypatch: pytest.MonkeyPatch, hosts: int
) -> None:
    want = [t for t in load(path) if t.success]
    monkeypatch.setattr(examples, "host_count", lambda: hosts)
    told: list[Any] = []
    for host in range(hosts):  # what each would tell the others
        monkeypatch.setattr(examples, "host_index", lambda host=host: host)
        monkeypatch.setattr(examples, "agree", lambda own: [told.append(own), own][1:])
        Examples(Stored(path))
    for host in range(hosts):
        monkeypatch.setattr(examples, "host_index", lambda host=host: host)
        monkeypatch.setattr(examples, "agree", lambda own: told)
        stored = Counted(path)
        found = Examples(stored)
        assert stored.reads == len(range(host, COUNT, hosts))
        assert found.sizes == [(len(t.ids), sum(a == POLICY for a in t.author)) for t in want]
        assert [e.ids for e in found] == [t.ids for t in want]
        assert [e.size for e in found] == found.sizes
