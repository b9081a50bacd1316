"""`remend report`, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.files import write_jsonl
from tools import cli


def test_it_prints_where_the_page_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "report.html")}
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("remend: error: no run folder at") and error.count("\n") == 1


def test_flags_that_do_not_fit_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path)
    for argv, message in (
        ([run, run], "add --compare"),
        ([run, "--compare"], "takes two runs"),
        ([run, run, "--compare"], "same run"),
        ([run, "--out", "x.html"], "--out is for --compare"),
        ([run, run, "--compare", "--figures", run], "leave out --compare"),
    ):
        assert cli.main(["report", *argv]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "metrics.jsonl", [{"phase": "rl", "step": 1, "rl/reward": 0.5}])
    figures = tmp_path / "figures"
    assert cli.main(["report", str(tmp_path), "--figures", str(figures), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["figures"][0] == str(figures / "rl-reward.svg")
    assert err.startswith("1 figures as SVG")
