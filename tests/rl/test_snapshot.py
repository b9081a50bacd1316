"""Snapshots: whole or not there, within their budget, also when the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model.hf
from configs.errors import InputError
from model.config import Qwen3Config
from model.hf import load_hf
from model.qwen3 import init
from model.tokenizer import Tokenizer
from rl.snapshot import Snapshots, validate

CONFIG = Qwen3Config(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_old_ones_go_and_equal_weights_have_equal_names(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    params = init(CONFIG, 0)
    snapshots = Snapshots(tmp_path / "a", CONFIG, tokenizer)
    written = [snapshots.write(params, version) for version in range(4)]
    assert names(tmp_path / "a") == ["v000002", "v000003"]
    validate(written[-1], CONFIG)
    again = Snapshots(tmp_path / "b", CONFIG, tokenizer).write(params, 3)
    assert again.label == written[3].label != written[2].label
    other = Snapshots(tmp_path / "c", CONFIG, tokenizer).write(init(CONFIG, 1), 3)
    assert other.label != again.label
    with pytest.raises(InputError, match="hidden_size is 32, not 64"):
        from dataclasses import replace

        validate(again, replace(CONFIG, hidden_size=64, head_dim=16))


def test_a_run_that_was_resumed_drops_what_came_later(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Not what it has just written, which is older by its number."""
    snapshots = Snapshots(tmp_path, CONFIG, tokenizer, keep=3)
    for version in range(8):
        snapshots.write(init(CONFIG, version), version)
    found = []
    for version in (4, 5, 6):
        snapshots.write(init(CONFIG, version), version)
        found.append(names(tmp_path))
    assert found == [["v000004"], ["v000004", "v000005"], ["v000004", "v000005", "v000006"]]


def test_bfloat16_halves_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    params = init(CONFIG, 0)
    whole = Snapshots(tmp_path / "a", CONFIG, tokenizer).write(params, 0)
    half = Snapshots(tmp_path / "b", CONFIG, tokenizer, dtype="bfloat16").write(params, 0)
    sizes = [(s.folder / "model.safetensors").stat().st_size for s in (whole, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
    np.testing.assert_allclose(
        np.asarray(load_hf(half.folder).params["embed"], np.float32), params["embed"], rtol=1e-2
    )


def test_a_disk_that_fills_up_leaves_the_last_one_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(tmp_path, CONFIG, tokenizer, keep=3)
    written = [snapshots.write(init(CONFIG, v), v) for v in range(3)]
    write, room = model.hf.write, [0]

    def filling(path: Path, *rest: Any) -> str:
        digest = write(path, *rest)
        if room[0] <= 0:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= 1
        return digest

    monkeypatch.setattr(model.hf, "write", filling)
    with pytest.raises(InputError, match="no room to write .*v000003"):
        snapshots.write(init(CONFIG, 3), 3)
    assert names(tmp_path) == ["v000002"]  # older ones were given up for it, the newest was not
    validate(written[2], CONFIG)
    room[0] = 1  # somebody has made room
    validate(snapshots.write(init(CONFIG, 3), 3), CONFIG)


def test_the_budget_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    params = init(CONFIG, 0)
    budget = (16 << 20) + 500_000  # the slack that a write wants, and little more
    snapshots = Snapshots(tmp_path, CONFIG, tokenizer, keep=9, budget_bytes=budget)
    for version in range(8):
        snapshots.write(params, version)
        held = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert held <= budget
    assert 1 <= len(names(tmp_path)) < 8
    assert names(tmp_path)[-1] == "v000007"
    small = Snapshots(tmp_path / "small", CONFIG, tokenizer, budget_bytes=1 << 20)
    with pytest.raises(InputError, match="raise server.sglang.snapshot_gib"):
        small.write(params, 0)
