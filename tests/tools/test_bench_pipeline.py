"""`remend bench pipeline`: what its rows say, and what it cannot measure is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.folder import load_policy
from sft.trajectory import save
from tools import cli
from tools.bench.pipeline import _episodes
from tools.run_config import POLICIES

SMALL = ["bench", "pipeline", "--rounds", "2", "--updates", "1", "--row-tokens", "1024"]


def test_nothing_verified_is_nothing_to_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _episodes(load_policy(POLICIES / "tiny").tokenizer, 3)
    for episode in made:
        assert 64 <= len(episode.ids) <= 1200 and 0.1 < sum(episode.author) / len(episode.ids) < 0.3
        episode.verdict = {"verdict": "fail"}
    save(tmp_path / "made.jsonl", made)
    assert cli.main([*SMALL, "--trajectories", str(tmp_path / "made.jsonl")]) == 2
    assert "holds no verified episode" in capsys.readouterr().err
    assert cli.main([*SMALL, "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
    assert cli.main([*SMALL, "--row-targets", "-1"]) == 2
    assert "--row-targets may not be below 0" in capsys.readouterr().err
    assert cli.main([*SMALL, "--trajectories", str(tmp_path / "none.jsonl")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.service
def test_rows_have_their_speed_beside_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--episodes", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["input", "packing", "training"] and rows["training"]["ratio"] == 1.0
    for row in rows.values():
        assert row["measure"] == "tokens_per_s" and 0 < row["low"] <= row["value"] <= row["high"]
        assert row["ratio"] == pytest.approx(row["value"] / rows["training"]["value"])
    assert rows["packing"]["value"] > rows["input"]["value"]  # which packing is a part of
    assert found["token_use"] == pytest.approx(found["tokens"] / found["packed_rows"] / 1024)
