"""The simulator against cases whose answer is known without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.schema import load
from rl.serving import check_serving
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory, save
from tools.cli import main
from tools.run_config import RunConfig
from tools.simulate import Episodes, SimulateConfig, Spread, measure, simulate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def always(value: float) -> Spread:
    return Spread(value, value)


def config(**changes: Any) -> SimulateConfig:
    """Every episode: 2 turns of 100 tokens at 10 a second, 5 s of tools each, 10 s of verdict:
    40 s in all."""
    episodes = Episodes(always(2), always(100), always(5), always(10))
    usual = {
        "steps": 12,
        "warmup": 2,
        "tasks_per_step": 2,
        "group_size": 2,
        "learn_s": 10.0,
        "snapshot_s": 2.0,
        "load_s": 1.0,
        "replicas": 2,
        "requests": 100,
        "request_tokens_per_s": 10.0,
        "replica_tokens_per_s": 1e9,
        "sandboxes": 100,
    }
    return SimulateConfig(episodes, **{**usual, **changes})


def test_in_turn_a_step_is_rollout_and_learning_and_publication() -> None:
    (row,) = simulate(config(max_staleness=(0,)))
    assert row["step_s"] == pytest.approx(40 + 10 + 3)
    assert row["learner_idle"] == pytest.approx(43 / 53)
    assert row["staleness"] == {"0": 1.0}
    assert row["episodes_per_h"] == pytest.approx(4 * 3600 / 53)


def test_far_enough_ahead_the_learner_is_never_idle() -> None:
    (row,) = simulate(config(max_staleness=(8,)))
    assert row["step_s"] == pytest.approx(10.0) and row["learner_idle"] == 0.0
    assert max(map(int, row["staleness"])) <= 8


def test_half_the_sandboxes_double_the_time() -> None:
    (row,) = simulate(config(max_staleness=(0,), sandboxes=2))
    assert row["step_s"] == pytest.approx(80 + 10 + 3)
    assert row["sandbox_idle"] == pytest.approx(1 - 80 / 93, abs=0.02)


def test_a_full_server_is_shared() -> None:
    """Two requests on each of two servers, which give 10 tokens a second in all."""
    (row,) = simulate(config(max_staleness=(0,), replica_tokens_per_s=10.0))
    assert row["step_s"] == pytest.approx(60 + 10 + 3)


def test_measured_episodes_are_replayed(tmp_path: Path) -> None:
    record = Trajectory("t", "p", "o", "train", "rl", 0, 0, "", seconds=40.0)
    for _ in range(2):
        record.add([1] * 5, ENVIRONMENT)
        record.add([2] * 100, POLICY)
    (tmp_path / "trajectories").mkdir()
    save(tmp_path / "trajectories" / "rl-000001.jsonl", [record])
    turns = measure(tmp_path, tokens_per_s=10.0)
    assert turns == [[(100, 20 / 3), (100, 20 / 3)]]  # 40 s, 20 of them sampling; verdict: a third
    with pytest.raises(InputError, match="no RL episodes"):
        measure(tmp_path / "elsewhere", 1.0)


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["steps=3", "warmup=1", "tasks_per_step=2", "max_staleness=[0, 1]"]
    path = str(CONFIGS / "simulate" / "32b-v5p-128.yaml")
    assert main(["simulate", path, *small, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["max_staleness"] for row in rows] == [0, 1]
    assert main(["simulate", path, "episodes.turns.p95=1"]) == 2
    assert "0 < median" in capsys.readouterr().err


@pytest.mark.service  # half a minute
def test_the_shipped_sizing_keeps_the_learner_busy() -> None:
    """As its comment says: at most a tenth of the time idle, no token older than 4 versions. Here
    a quarter of everything that counts groups or servers, for speed."""
    path = CONFIGS / "simulate" / "32b-v5p-128.yaml"
    quarter = ["tasks_per_step=8", "replicas=7", "sandboxes=512"]
    (row,) = simulate(
        load(SimulateConfig, path, [*quarter, "max_staleness=[4]", "steps=20", "warmup=8"])
    )
    assert row["learner_idle"] <= 0.1
    assert max(int(age) for age in row["staleness"]) <= 4
    assert row["step_s"] == pytest.approx(94, rel=0.11)


@pytest.mark.parametrize("name", ["cpu", "async-cpu", "tpu-host", "replicas"])
def test_the_shipped_configs_load(name: str) -> None:
    found = load(RunConfig, CONFIGS / f"sglang-{name}.yaml", ["server.sglang.python=/bin/sh"])
    assert found.server.kind != "inprocess" and found.rl.weight_cap > 0
    check_serving(found.server.kind, found.server.sglang)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("sglang", {"router": "http://r"}, "urls of the servers behind it"),
        ("sglang-jax", {"urls": ("http://a",)}, "by a restart only"),
        ("sglang-jax", {"urls": ("http://a",), "restart": "x", "router": "http://r"}, "router"),
        ("sglang", {"python": "/nowhere/python"}, "/nowhere/python does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: Any, changes: dict, says: str) -> None:
    from rl.serving import SGLangConfig

    with pytest.raises(InputError, match=says):
        check_serving(kind, SGLangConfig(**changes))


def test_serve_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(CONFIGS.parent / "model" / "policies" / "tiny")
    assert main(["serve", tiny, "--chip", "cpu", "--port", "31000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    at = found["command"].index
    assert found["command"][at("--model-path") + 1] == tiny
    assert found["command"][at("--host") + 1] == "127.0.0.1"
    assert found["command"][at("--weight-version") + 1] == found["label"]
    assert main(["serve", tiny, "--chip", "tpu", "--print"]) == 0
    assert "sgl_jax.launch_server" in capsys.readouterr().out
    for bad in (["--chip", "tpu", "--kind", "sglang"], ["--port", "0"], ["--python", "/no/such"]):
        assert main(["serve", tiny, *bad]) == 2
    capsys.readouterr()
    assert main(["serve", str(CONFIGS), "--print"]) == 2
    assert "config.json" in capsys.readouterr().err
