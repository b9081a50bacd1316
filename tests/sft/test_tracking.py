"""TensorBoard and Weights & Biases get what metrics.jsonl holds, each step once."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import InputError, MissingExtra
from configs.files import read_jsonl
from sft.metrics import Metrics
from sft.tracking import TrackingConfig, open_trackers


def wants(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


def run(folder: Path, config: TrackingConfig, steps: range) -> None:
    """One process's part of a run of two phases: it goes on behind step `steps.start`."""
    trackers = open_trackers(config, folder)
    metrics = Metrics(folder, trackers)
    for phase in ("sft", "rl"):
        metrics.rewind(phase, steps.start)
        for step in steps:
            metrics.write(phase, step + 1, {f"{phase}/loss": step / 3, "time/learn_s": 0.5})
    for tracker in trackers:
        tracker.close()


def points(folder: Path) -> list[tuple[str, int, str, float]]:
    """(phase, step, metric, value) of every scalar in the event files, sorted."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.glob("tensorboard/*/events.*"):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # length, its CRC, the record, its CRC
            event = Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            for value in event.summary.value:
                found.append((path.parent.name, event.step, value.tag, value.simple_value))
    return sorted(found)


def kept(folder: Path) -> list[tuple[str, int, str, float]]:
    return sorted(
        (row["phase"], row["step"], name, pytest.approx(value, rel=1e-6))
        for row in read_jsonl(folder / "metrics.jsonl")
        for name, value in row.items()
        if "/" in name
    )


@wants("tensorboardX")
def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """It was killed behind step 5, with a checkpoint of step 3; then once more before it began."""
    config = TrackingConfig(tensorboard=True)
    run(tmp_path, config, range(5))
    assert points(tmp_path) == kept(tmp_path)
    run(tmp_path, config, range(3, 3))
    run(tmp_path, config, range(3, 8))
    assert points(tmp_path) == kept(tmp_path)
    assert len(kept(tmp_path)) == 2 * 8 * 2


def records(log: bytes) -> Iterator[bytes]:
    """Of a `.wandb` file, which is a LevelDB log: blocks of 32 KiB behind a header of 7 bytes, each
    of pieces with CRC, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


@wants("wandb")
def test_wandb_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, by the real package; what a resumed run leaves is whole by itself."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrackingConfig(wandb="remend")
    run(tmp_path, config, range(5))
    time.sleep(1.1)  # its folders are named by the second
    run(tmp_path, config, range(3, 8))
    wandb.teardown()
    found: dict[tuple[str, str], list[tuple]] = {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                phase = path.stem.rpartition("-")[2]
                entries = found.setdefault((phase, str(path)), [])
                entries += [
                    (phase, int(row["_step"]), name, float(value))
                    for name, value in row.items()
                    if "/" in name and not name.startswith("_")
                ]
    assert len(found) == 4
    newest = {phase: entries for (phase, _), entries in found.items()}
    assert sorted(sum(newest.values(), [])) == kept(tmp_path)


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("tensorboardX", TrackingConfig(tensorboard=True)),
        ("wandb", TrackingConfig(wandb="remend")),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, config: TrackingConfig
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed: pip install 'remend\["):
        open_trackers(config, tmp_path)
    assert open_trackers(TrackingConfig(), tmp_path) == []


@wants("wandb")
def test_without_a_login_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="log in with `wandb login`, or set WANDB_MODE=offline"):
        open_trackers(TrackingConfig(wandb="remend"), tmp_path)
    assert not list(tmp_path.glob("wandb*"))
