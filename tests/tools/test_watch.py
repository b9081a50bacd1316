"""`remend watch`: what it shows of a run that is written while it looks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.files import append_jsonl, write_atomic, write_jsonl
from sft.metrics import Metrics
from tools import cli
from tools.run_state import RunState, Tail
from tools.watch import spark


def episode(task: str, verdict: str = "pass", **changes: Any) -> dict[str, Any]:
    return {
        "task": task,
        "policy": "rl",
        "turns": [{}, {}],
        "tool_counts": {"edit": 2},
        "verdict": {"verdict": verdict, "flags": []},
        "seconds": 1.25,
        **changes,
    }


def test_a_tail_reads_each_whole_line_once_and_a_replaced_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    append_jsonl(path, {"step": 1})
    with open(path, "ab") as file:
        file.write(b'{"step": 2')
    assert tail.read() == [{"step": 1}] and tail.read() == []
    with open(path, "ab") as file:
        file.write(b"}\nnot json\n")
    assert tail.read() == [{"step": 2}] and not tail.rewound
    write_jsonl(path, [{"step": 1}])
    assert tail.read() == [{"step": 1}] and tail.rewound


def test_a_resumed_run_takes_back_its_steps(tmp_path: Path) -> None:
    metrics, state = Metrics(tmp_path), RunState(tmp_path)
    for step in (1, 2, 3):
        metrics.write("rl", step, {"rl/reward": step / 10})
    state.update()
    assert (state.stage, state.step, list(state.curves["rl/reward"])) == ("rl", 3, [0.1, 0.2, 0.3])
    metrics.rewind("rl", 1)
    metrics.write("rl", 2, {"rl/reward": 0.9})
    state.update()
    assert (state.step, list(state.curves["rl/reward"])) == (2, [0.1, 0.9])


def test_stages_follow_what_the_job_writes(tmp_path: Path) -> None:
    state = RunState(tmp_path)
    state.update()
    assert (state.stage, state.changed, state.done) == ("not started", None, False)
    partial = tmp_path / "trajectories" / "eval-rl.jsonl.partial"
    write_atomic(tmp_path / "config.yaml", "rl: {steps: 9, tasks_per_step: 2, group_size: 3}\n")
    values = {"rl/tokens": 50.0, "time/rollout_s": 3.0, "time/learn_s": 1.0}
    Metrics(tmp_path).write("rl", 4, values)
    state.update()
    assert (state.stage, state.step, state.steps) == ("rl", 4, 9)
    assert state.values["rollout/tokens_per_s"] == 50.0 * 6 / 3
    assert state.values["time/rollout_share"] == 0.75
    for n in range(3):
        append_jsonl(partial, episode(f"t-{n}"))
    os.utime(tmp_path / "metrics.jsonl", (1, 1))
    state.update()
    append_jsonl(partial, episode("t-3", "quarantine"))
    state.update()
    assert (state.stage, state.episodes) == ("eval-rl", 4)
    assert [e["task"] for e in state.last] == ["t-3", "t-2", "t-1", "t-0"]
    os.rename(partial, partial.with_suffix(""))
    write_atomic(tmp_path / "summary.json", json.dumps({"success": {"rl": {"mean": 0.5}}}))
    state.update()
    assert state.done and state.summary["success"]["rl"]["mean"] == 0.5


def test_a_finished_run_in_one_frame_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b]0;owned\x07[red]\u202e"
    record = episode("t-1", "fail", tool_counts={hostile: 3})
    record["verdict"]["flags"] = [f"outside:{hostile}"]
    write_jsonl(tmp_path / "trajectories" / "eval-rl.jsonl", [record])
    Metrics(tmp_path).write("rl", 7, {"rl/success": 0.5, "rl/loss": float("nan")})
    write_atomic(tmp_path / "summary.json", json.dumps({"success": {"rl": {"mean": 0.371}}}))
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "37.1%" in shown and "50.0%" in shown and "t-1" in shown and "[red]" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert cli.main(["watch", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["stage"], found["done"], found["step"]) == ("done", True, 7)
    assert found["metrics"] == {"rl/success": 0.5, "rl/loss": None}
    assert found["last"][0]["outcome"] == "fail" and found["success"] == {"rl": 0.371}


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("remend: error: no run folder at")


def test_a_curve_in_one_line() -> None:
    assert spark([0.0, 0.25, 1.0]) == "▁▃█"
    assert spark([0.0, float("nan"), 1.0]) == "▁ █"
    assert spark([]) == "" and spark([2.0]) == "▁"
    assert len(spark([float(n) for n in range(500)])) == 32
