"""Trajectories as a TFDS dataset, through the real command line, and read by others' means."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.errors import InputError
from sft.dataset import (
    _IDS,
    _JSON,
    _REAL,
    _TEXT,
    _WHOLE,
    NAME,
    Published,
    write_dataset,
)
from sft.examples import Examples
from sft.trajectory import Trajectory, Turn, load
from tests.tools.hosts import CONFIG, prepare
from tools import cli

tfds = pytest.importorskip("tensorflow_datasets", reason="remend[datasets] is not installed")


def trajectory(number: int, **more: object) -> Trajectory:
    rng = np.random.default_rng(number)
    written, seen = int(rng.integers(1, 30)), int(rng.integers(1, 30))
    call = {"name": "edit", "arguments": {"old": "x", "new": f"ü{number}"}}
    found = Trajectory(
        task=f"task-{number}",
        package="mini",
        operator="comparison",
        split="train",
        policy="teacher",
        seed=2**40 + number,
        weight_version=number - 1,
        prompt="naïve \udcff prompt",
        turns=[Turn("text", [call], ["seen\n"])],
        patch=f"+{number}\n",
        verdict={"verdict": "pass", "flags": [], "seconds": 0.25},
        reward=1.0,
        stop="submit",
        seconds=1234.567,
        sandbox_s=12.345,
        environment="full",
        other_verdict={"verdict": "fail", "flags": ["x"]},
    )
    found.add(rng.integers(0, 2**17, seen).tolist(), 0)
    logprobs = (-rng.random(written).astype(np.float32)).tolist()
    found.add(rng.integers(0, 2**17, written).tolist(), 1, logprobs, [number] * written)
    for name, value in more.items():
        setattr(found, name, value)
    return found


def test_what_was_written_is_read_in_any_order(tmp_path: Path) -> None:
    there = [trajectory(n) for n in range(40)]
    there[3].verdict = {"verdict": "fail"}
    examples = Examples(there)
    path = write_dataset(tmp_path, examples)
    assert path == tmp_path / NAME / "1.0.0"
    found = Published(tmp_path)
    want = [t for t in there if t.success]
    assert len(found) == len(want) == 39
    for i in (38, 0, 17, -1, *range(39)):
        for field, value in vars(want[i]).items():
            if field == "prompt":  # a lone surrogate is kept as an escape, as in JSON files
                value = "naïve \\udcff prompt"
            assert getattr(found[i], field) == value, field
    assert found[5:8] == [found[5], found[6], found[7]]
    again = Examples(found)
    assert list(again) == list(examples)
    # anybody's tools: features without this project
    source = tfds.data_source(NAME, data_dir=str(tmp_path), split="train")
    np.testing.assert_array_equal(source[2]["weight"], np.float32(examples[2].weight))
    np.testing.assert_array_equal(source[2]["ids"], examples[2].ids)


def test_every_field_of_a_trajectory_is_a_feature() -> None:
    features = [*_IDS, *_TEXT, *_WHOLE, *_REAL, *_JSON]
    assert sorted(features) == sorted(field.name for field in fields(Trajectory))


def test_a_dataset_is_not_written_over_nor_made_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trajectory to keep"):
        write_dataset(tmp_path, Examples([]))
    write_dataset(tmp_path, Examples([trajectory(0)]))
    with pytest.raises(InputError, match="is a dataset already"):
        write_dataset(tmp_path, Examples([trajectory(1)]))
    with pytest.raises(InputError, match="holds no remend_trajectories"):
        Published(tmp_path / "elsewhere")


def test_what_else_is_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "mine").write_text("x")
    write_dataset(tmp_path, Examples([trajectory(0)]))
    assert (tmp_path / "downloads" / "mine").read_text() == "x"
    (tmp_path / "other").mkdir()
    write_dataset(tmp_path / "other", Examples([trajectory(0)]))
    assert [path.name for path in (tmp_path / "other").iterdir()] == [NAME]


def test_cut_off_while_it_is_written_it_is_no_dataset(tmp_path: Path) -> None:
    class Torn(Examples):
        def weighted(self):  # type: ignore[no-untyped-def]
            yield from list(super().weighted())[:2]
            raise KeyboardInterrupt

    there = [trajectory(n) for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, Torn(there))
    with pytest.raises(InputError, match="holds no remend_trajectories"):
        Published(tmp_path)
    write_dataset(tmp_path, Examples(there))
    assert len(Published(tmp_path)) == 4


def test_sft_on_the_dataset_is_sft_on_the_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "mesh": {}}))
    short = ["sft.epochs=2"]
    teach = ["teach", "run.yaml", "--out", "one", "--json", "--dataset", "data", *short]
    assert cli.main(teach) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["dataset"] == f"data/{NAME}/1.0.0"
    assert (
        len(Published(Path("data")))
        == outcome["kept"]
        < len(load(Path("one/trajectories/teacher.jsonl")))
    )
    assert cli.main([*teach[:3], "four", *teach[4:]]) == 2 and not Path("four").exists()
    assert "is a dataset already" in capsys.readouterr().err
    published = ["teach.teacher=dataset", "teach.dataset=data"]
    assert cli.main(["sft", "run.yaml", "--out", "one", *short]) == 0
    assert cli.main(["sft", "run.yaml", "--out", "two", *short, *published]) == 0
    one, two = (
        [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert len(one) >= 2
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("time/")} == {
            k: v for k, v in b.items() if not k.startswith("time/")
        }
    assert not Path("two/trajectories").exists()
    other = ["sft", "run.yaml", "--out", "three", *published, "agent.declare_tools=true"]
    assert cli.main([*other, "agent.max_tokens=512"]) == 2
    assert "another tokenizer" in capsys.readouterr().err and not Path("three").exists()


def test_nothing_of_it_needs_tensorflow(tmp_path: Path) -> None:
    write_dataset(tmp_path, Examples([trajectory(0)]))
    code = (
        "import sys; from pathlib import Path; from sft.dataset import Published\n"
        f"print(Published(Path({str(tmp_path)!r}))[0].task, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "task-0 False\n", done.stderr
