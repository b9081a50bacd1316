"""Bad input to the big verbs: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.cli import main
from tools.quickstart import CONFIG

TINY = Path(__file__).parents[2] / "model" / "policies" / "tiny"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb that must refuse; its one line."""
    assert main([*argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("remend: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rl.stepz=3", "did you mean rl.steps"),
        ("rl.steps=many", "rl.steps"),
        ("sandbox.backend=cloud", "sandbox.backend"),
        ("policy=nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_wrong_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, says: str
) -> None:
    run = tmp_path / "run"
    line = refused(capsys, "quickstart", "--out", str(run), override)
    assert says.split()[-1] in line
    assert not run.exists()


def test_a_config_that_is_no_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(CONFIG.read_text() + "\n  ]broken: [")
    run = tmp_path / "run"
    assert "bad.yaml" in refused(capsys, "rl", str(bad), "--out", str(run))
    assert not run.exists()


def test_a_truncated_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in TINY.iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = tmp_path / "run"
    line = refused(capsys, "quickstart", "--out", str(run), f"policy={policy}")
    assert "model.safetensors" in line
    assert not run.exists()


def test_a_policy_to_evaluate_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = refused(capsys, "eval", str(CONFIG), "--policy", "nowhere/at/all", "--out", str(run))
    assert "nowhere/at/all" in line
    assert not run.exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["start=nowhere/at/all"], "nowhere/at/all"),
        ([f"start={TINY}", "model.num_hidden_layers=5"], "another shape"),
    ],
)
def test_a_start_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str], says: str
) -> None:
    run, config = tmp_path / "run", CONFIG.with_name("pretrain-tries.yaml")
    assert says in refused(capsys, "pretrain", str(config), "--out", str(run), *overrides)
    assert not run.exists()


def test_another_config_in_the_same_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("# seed: 0\npolicy: other\n")
    assert "another config or seed" in refused(capsys, "quickstart", "--out", str(run))
