"""`remend bench plan`: what is asked of MaxText, and what is made of both answers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import cli
from tools.bench import plan
from tools.plan import cache
from tools.plan.figures import Figures, Traffic

VERSIONS = {"jax": "0", "libtpu": "0"}


def figures(temporaries: float, *sent: tuple[str, str, float]) -> Figures:
    rows = tuple(
        Traffic(kind, (axis,), "ici", 4, "bf16", "", 1, size, 0.5) for kind, axis, size in sent
    )
    return Figures(
        arguments=4e9,
        outputs=4e9,
        aliased=4e9,
        temporaries=temporaries,
        host=0,
        matmul_flops=3e12,
        attention_flops=1e12,
        hbm_bytes=5e9,
        compute_s=1,
        hbm_s=1,
        ici_s=0.5 * len(rows),
        dcn_s=0,
        collectives=rows,
        notes=(),
        compile_s=1,
    )


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = figures(1e9, ("all-gather", "fsdp", 2e9), ("all-gather", "fsdp", 1e9))
    theirs = figures(2e9, ("all-gather", "fsdp", 6e9), ("all-reduce", "tensor", 3e9))
    monkeypatch.setenv("TPU_LIBRARY_PATH", "")
    monkeypatch.setattr(plan, "_ours", lambda _: {"figures": ours, "versions": VERSIONS})
    told = {"figures": theirs, "versions": VERSIONS, "library": "/theirs/libtpu.so"}
    monkeypatch.setattr(plan, "_maxtext", lambda *_: told)


def test_ratios(both: None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "plan", "--maxtext-python", sys.executable]
    assert cli.main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {row["measure"]: row["ratio"] for row in rows if row["name"] == "maxtext"}
    assert found["HBM, temporaries"] == 1 / 2 and found["HBM, all"] == 5 / 6
    assert found["sent, all"] == 1 / 3
    assert found["sent, all-gather over fsdp"] == 1 / 2
    assert found["sent, all-reduce over tensor"] == 0
    assert cli.main(argv) == 0
    assert "all-reduce over tensor" in capsys.readouterr().out
    assert os.environ["TPU_LIBRARY_PATH"] == "/theirs/libtpu.so"  # one compiler for both


def test_the_version_is_that_of_the_compiler_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu-9.8.7.dist-info").mkdir()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu" / "libtpu.so"))
    assert cache.versions()["libtpu"] == "9.8.7"


def test_the_same_job(tmp_path: Path) -> None:
    options = plan._parse(["--rows", "16", "--tokens", "4096"])
    settings = dict(text.split("=") for text in plan._settings(options, 64, 1, tmp_path))
    assert settings["per_device_batch_size"] == "0.25"
    assert settings["max_target_length"] == "4096" and settings["remat_policy"] == "full"


def test_maxtext_that_does_not_compile(
    both: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        plan._run(Path(sys.executable), Path("nowhere"), [])  # here is no MaxText

    monkeypatch.setattr(plan, "_maxtext", fails)
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert cli.main(["bench", "plan", "--maxtext-python", sys.executable]) == 1
    assert "maxtext could not be compiled: ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [([], "--maxtext-python or --install"), (["--maxtext-python", "/no/such"], "/no/such")],
)
def test_without_an_interpreter(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "plan", *argv]) == 2
    assert says in capsys.readouterr().err
