"""`remend plan` as a person calls it, on a small slice."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("libtpu")

from rich.console import Console

from model.config import Qwen3Config
from tools.cli import main
from tools.plan.table import show

SMALL = Qwen3Config(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
)
CONTRACT = {  # what others rely on
    *("fits", "hbm_gib", "flops_per_chip", "flops_expected", "collectives", "step_s"),
    "mfu_ceiling",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a small model on eight chips, and an empty cache."""
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text(json.dumps(SMALL.to_hf()))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
mesh: {{topology: "v5e:2x4", fsdp: 8}}
policy: {policy}
network: {{dtype: bfloat16, remat: full, attention: splash}}
sft: {{batch_rows: 64, microbatch_rows: 8, row_tokens: 512, row_targets: 0}}
"""
    )
    return path


def plan(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, Any, str]:
    """(exit code, the JSON object or None, stderr)."""
    code = main(["plan", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_it_fits(capsys, config, tmp_path):
    code, found, _ = plan(capsys, config, "--out", tmp_path / "out")
    assert code == 0 and found["fits"]
    assert found.keys() >= CONTRACT
    hbm = found["hbm_gib"]
    assert hbm["total"] == pytest.approx(hbm["arguments"] + hbm["temporaries"])
    assert hbm["total"] < 0.9 * hbm["capacity"] == 0.9 * 15.75
    assert hbm["estimate"].keys() >= {"arguments", "temporaries", "total"}
    assert found["flops_per_chip"] == pytest.approx(found["flops_expected"], rel=0.03)
    seconds = found["step_s"]
    assert seconds[seconds["bound"]] == max(seconds[t] for t in ("compute", "hbm", "ici", "dcn"))
    assert 0 < found["mfu_ceiling"] < 1
    kinds = {(row["kind"], *row["axes"], row["link"]) for row in found["collectives"]}
    assert kinds >= {("all-gather", "fsdp", "ici"), ("reduce-scatter", "fsdp", "ici")}
    assert [(p["name"], p["runs"]) for p in found["programs"]] == [("step", 1), ("export", 0)]
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written == {key: value for key, value in found.items() if key != "path"}

    # the same again is not compiled again
    code, again, err = plan(capsys, config)
    assert code == 0 and again["cached"] and not found["cached"]
    assert "compiling" not in err
    changed = {"cached", "path"}
    assert {k: v for k, v in again.items() if k not in changed} == {
        k: v for k, v in found.items() if k not in changed
    }
    assert main(["plan", str(config)]) == 0
    table = capsys.readouterr().out
    assert "fits: " in table and "all-gather" in table and "from the cache" in table


def test_reinforcement_with_a_reference(capsys, config):
    """The default where the config says something about it; a second set of parameters stays."""
    keys = [
        *("rl.tasks_per_step=6", "rl.group_size=8", "rl.microbatch_rows=16"),
        *("rl.row_tokens=512", "rl.row_targets=0", "rl.loss.kl_coef=0.001"),
    ]
    code, found, _ = plan(capsys, config, *keys)
    assert code == 0 and (found["stage"], found["rows"]) == ("rl", 48)
    step, reference, _ = found["programs"]
    assert (reference["name"], reference["runs"]) == ("reference", 3)
    assert found["flops_per_chip"] == step["flops_per_chip"] + 3 * reference["flops_per_chip"]
    assert found["flops_per_chip"] == pytest.approx(found["flops_expected"], rel=0.03)
    parameters = 4 * SMALL.num_parameters / 8 / 2**30
    assert step["hbm_gib"]["arguments"] == pytest.approx(4 * parameters, rel=0.02)


@pytest.mark.timeout(900)
def test_what_would_fit(capsys, config):
    """Too much is kept of too many tokens: one change is enough."""
    code, found, _ = plan(
        capsys,
        config,
        *("network.remat=none", "sft.row_tokens=4096", "sft.microbatch_rows=1024"),
        "sft.batch_rows=1024",
    )
    assert code == 1 and not found["fits"]
    assert found["hbm_gib"]["total"] > 0.9 * 15.75
    assert found.keys() >= CONTRACT
    assert any("gave up" in note for note in found["notes"])
    shown = io.StringIO()
    show(found, Console(file=shown, width=80))
    near = found["nearest"]
    assert f"it would with {near['changes'][0]}" in shown.getvalue()
    assert len(near["changes"]) == 1 and near["compiled"]
    assert near["hbm_gib"] <= 0.9 * 15.75


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["mesh.fsdp=4"], "takes 4 devices, v5e:2x4 has 8: mesh.fsdp=8"),
        (["mesh.fsdp=2", "mesh.tensor=4"], "num_key_value_heads = 2 does not divide over tensor"),
        (["sft.microbatch_rows=12"], "12 rows of a microbatch do not divide"),
        (["sft.batch_rows=20"], "batch_rows = 20 is not a multiple of microbatch_rows = 8"),
        (["mesh.slice=2", "mesh.fsdp=4"], "set mesh.slice=1"),
        (["--topology", "v5e:2x2"], "no mesh is shipped for v5e:2x2"),
        (["--topology", "v5e-7"], "did you mean v5e-8"),
        (["policy=Qwen/Qwen3-33B"], "qwen3-32b"),
        (["mesh.fsdp=4", "mesh.context=2"], "set attention to context, not splash"),
        (
            ["mesh.fsdp=4", "mesh.context=2", "network.attention=context", "sft.row_targets=64"],
            "set sft.row_targets=0",
        ),
    ],
)
def test_what_is_refused_before_compiling(capsys, config, keys, says):
    code, found, err = plan(capsys, config, *keys)
    assert code == 2 and found is None
    line = next(line for line in err.splitlines() if line.startswith("remend: error: "))
    assert says in line


def test_a_topology_brings_its_mesh(capsys, config):
    """That of configs/mesh, which does not suit this small model."""
    code, _, err = plan(capsys, config, "--topology", "v5e-256")
    assert code == 2 and "over tensor = 4: nearest legal 2" in err


def test_search(capsys, config):
    code, found, err = plan(capsys, config, "--search", "--compile", "1")
    assert code == 0 and found["fits"]
    assert found.keys() >= CONTRACT
    first = found["search"][0]
    assert first["choice"] == found["choice"] and first["compiled"]["fits"]
    assert len(found["search"]) > 5
    bounds = [row["estimate"]["least_s"] for row in found["search"]]
    assert bounds == sorted(bounds)
    assert first["compiled"]["hbm_gib"] == pytest.approx(found["hbm_gib"]["total"])
    shown = io.StringIO()
    show(found, Console(file=shown, width=80))
    assert f"the best: {' '.join(found['choice'])}" in shown.getvalue().replace("\n", " ")
    # what it found is what a config would say
    code, again, _ = plan(capsys, config, *found["choice"])
    assert code == 0 and again["cached"] and again["mesh"] == found["mesh"]


def test_a_search_for_more_than_there_is(capsys, config):
    code, _, err = plan(
        capsys, config, "--search", "sft.batch_rows=7", "sft.row_tokens=512"
    )  # seven rows are shared by no eight chips
    assert code == 2 and "no mesh of 8 devices" in err
