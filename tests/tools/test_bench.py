"""`remend bench model`: its arithmetic on made-up tracks, its workers for real on a tiny shape.

No test says anything about how fast something is.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from tools import cli
from tools.bench import install as installing
from tools.bench.compare import Row, quartiles, rows
from tools.bench.peer import OURS, PEERS, SCRIPTS, Call, PeerFailed, Worker, script_of
from tools.bench.rounds import Track, measure
from tools.bench.table import show

TINY = [
    *("model.vocab_size=64", "model.hidden_size=16", "model.intermediate_size=24"),
    *("model.num_hidden_layers=1", "model.num_attention_heads=2", "model.num_key_value_heads=1"),
    *("model.head_dim=8", "rows=2", "tokens=12", "slots=2", "prompt=5", "new=4"),
    *("repetitions=2", "warmup=0"),
]


def call(seconds: float, result: object = 0.0, peak: float = 100.0) -> Call:
    return Call(seconds, seconds / 2, peak, result)


def track(seconds: Sequence[float], result: object = 0.0) -> Track:
    """A first call of nine seconds, then the given ones."""
    return Track({}, [call(9.0, result), *(call(s, result) for s in seconds)], untimed=1)


def by_name(found: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in found}


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 3, 4)


def test_a_row_holds_medians_over_the_timed_calls() -> None:
    tracks = {OURS: track([1, 2, 4]), "tunix": track([2, 2, 20])}
    found = by_name(rows({"train": tracks}, {"train": 8}))
    ours, theirs = found[OURS], found["tunix"]
    assert (ours.value, ours.low, ours.high) == (4, 3, 6)
    assert ours.per_cpu_s == 8 and ours.first_call_s == 9 and ours.peak_mib == 100
    assert ours.ratio == 1 and theirs.value == 4
    # round by round: 2, 1 and 5 times as fast
    assert (theirs.ratio, theirs.ratio_low, theirs.ratio_high) == (2, 1.5, 3.5)


def test_results_are_compared_with_transformers_and_without_it_with_ours() -> None:
    logprobs = {
        OURS: track([1], [[-1.0, -2.0]]),
        "transformers": track([1], [[-1.0, -2.00001]]),
        "easydel": track([1], [[-1.0, -2.1]]),
        "tunix": track([1], [[-1.0, float("nan")]]),
    }
    found = by_name(rows({"logprobs": logprobs}, {"logprobs": 2}))
    assert found["transformers"].difference is None and found["transformers"].same
    assert found[OURS].difference == pytest.approx(1e-5) and found[OURS].same
    assert found["easydel"].difference == pytest.approx(0.09999) and not found["easydel"].same
    assert found["tunix"].difference == sys.float_info.max and not found["tunix"].same
    del logprobs["transformers"]
    found = by_name(rows({"logprobs": logprobs}, {"logprobs": 2}))
    assert found[OURS].difference is None
    assert found["easydel"].difference == pytest.approx(0.1)


def test_a_peer_with_other_logprobs_is_marked_in_every_measure() -> None:
    odd, right = track([1], [[-3.0]]), track([1], [[-1.0]])
    loss = Track({}, [call(1, 5.0), call(1, 4.9)], untimed=1)
    measured = {
        "train": {OURS: loss, "easydel": loss},
        "logprobs": {OURS: right, "easydel": odd},
    }
    found = rows(measured, {"train": 1, "logprobs": 1})
    assert [row.same for row in found if row.name == "easydel"] == [False, False]
    assert all(row.same for row in found if row.name == OURS)


def test_sampled_ids_and_losses_have_their_own_measures_of_distance() -> None:
    sampled = {
        OURS: track([1], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        "tunix": track([1], [[1, 2, 3, 4], [5, 6, 7, 9]]),
        "easydel": track([1], [[4, 3, 2, 1], [5, 6, 7, 8]]),
    }
    found = by_name(rows({"sample": sampled}, {"sample": 8}))
    assert found["tunix"].difference == 1 / 8 and found["tunix"].same
    assert found["easydel"].difference == 1 / 2 and not found["easydel"].same
    # steps far from the start may drift apart by rounding, the first three may not
    losses = [3.0, 2.0, 1.0, 0.5]
    steps = [[call(1, loss) for loss in run] for run in (losses, [3.0, 2.1, 1.0, 9.0])]
    tracks = {name: Track({}, run, 1) for name, run in zip((OURS, "tunix"), steps, strict=True)}
    found = by_name(rows({"train": tracks}, {"train": 1}))
    assert found["tunix"].difference == pytest.approx(0.1) and not found["tunix"].same


def test_the_table_fits_a_terminal_and_marks_who_computes_something_else() -> None:
    tracks = {name: track([1.0], [[-1.0]]) for name in PEERS}
    tracks["easydel"] = track([2.0], [[-1.5]])
    out = io.StringIO()
    show(rows({"logprobs": tracks}, {"logprobs": 123456}), Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert set(PEERS) <= set(lines)
    assert "(2.00)" in lines["easydel"] and "5.0e-01" in lines["easydel"]
    assert "reference" in lines["transformers"] and " 1.00 " in lines["transformers"]


def test_without_remend_there_is_no_ratio() -> None:
    (row,) = rows({"train": {"tunix": track([1])}}, {"train": 1})
    assert row.ratio is None and row.difference is None
    show([row], Console(file=io.StringIO()))


class FakeWorker:
    """Answers at once; fails at the `fails`-th call."""

    def __init__(self, name: str, log: list[str], fails: int = 99) -> None:
        self.name, self._log, self._left = name, log, fails

    def ready(self) -> dict[str, str]:
        return {"it": "1.0"}

    def call(self) -> Call:
        self._left -= 1
        if self._left <= 0:
            raise PeerFailed("out of memory")
        self._log.append(self.name)
        return call(1.0)

    def close(self) -> None:
        self._log.append(f"{self.name} closed")


def test_rounds_visit_every_peer_in_turn() -> None:
    log: list[str] = []
    starts = {name: lambda name=name: FakeWorker(name, log) for name in ("a", "b")}
    tracks, failed = measure(starts, 1, 3)  # type: ignore[arg-type]
    assert log == ["a", "a", "b", "b", *["a", "b"] * 3, "a closed", "b closed"]
    assert not failed and [len(t.timed) for t in tracks.values()] == [3, 3]


def test_a_peer_that_fails_leaves_the_others_alone() -> None:
    log: list[str] = []

    def absent() -> FakeWorker:
        raise PeerFailed("no such interpreter")

    starts = {
        "a": lambda: FakeWorker("a", log),
        "b": lambda: FakeWorker("b", log, fails=3),
        "c": absent,
    }
    tracks, failed = measure(starts, 0, 3)  # type: ignore[arg-type]
    assert failed == {"b": "out of memory", "c": "no such interpreter"}
    assert list(tracks) == ["a"] and len(tracks["a"].timed) == 3
    assert log[-2:] == ["a closed", "b closed"]


def test_our_worker_and_plain_jax_compute_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    """Both for real, all measures, through the command line."""
    argv = ["bench", "model", *TINY, "--cores", "1", "--json"]
    assert cli.main([*argv, "--only", OURS, "--only", "plain-jax"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["cores"] == 1 and told["failed"] == {} and told["settings"]["tokens"] == 12
    assert set(told["reference"].values()) == {OURS}
    assert set(told["versions"][OURS]) >= {"remend", "jax"}
    assert [(row["measure"], row["name"]) for row in told["rows"]] == [
        (measure, name)
        for measure in ("train", "logprobs", "sample")
        for name in (OURS, "plain-jax")
    ]
    for row in told["rows"]:
        assert row["value"] > 0 and row["first_call_s"] > 0 and row["peak_mib"] > 10
        assert row["same"], row
        assert row["ratio"] == 1 if row["name"] == OURS else row["ratio"] > 0
        if row["name"] == "plain-jax":
            assert row["difference"] <= 1e-4


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\necho 'ImportError: no tunix here' >&2\nexit 3\n", "no tunix here"),
        ("#!/bin/sh\nexit 3\n", "exit code 3"),
        ("#!/no/such/interpreter\n", "does not run"),
    ],
)
def test_a_worker_that_cannot_start_says_why(tmp_path: Path, script: str, says: str) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    cores = os.sched_getaffinity(0)
    with pytest.raises(PeerFailed, match=says):
        worker = Worker("tunix", python, {"device": "cpu"}, [min(cores)], tmp_path / "log")
        try:
            worker.ready()
        finally:
            worker.close()
    assert os.sched_getaffinity(0) == cores


def test_a_broken_interpreter_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--measure", "logprobs", "--only", "tunix", "--peer", "tunix=/bin/false"]
    assert cli.main(["bench", "model", *TINY, *argv, "--json"]) == 1
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert told["rows"] == [] and "exit code 1" in told["failed"]["tunix, logprobs"]
    lines = [line for line in err.splitlines() if "could not be measured" in line]
    assert len(lines) == 1 and "exit code 1" in lines[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["rowz=2"], "did you mean rows?"),
        (["tokens=1"], "tokens must be at least 2"),
        (["prompt=4000", "new=4000"], "max_position_embeddings"),
        (["--peer", "tunics=/bin/sh"], "NAME one of"),
        (["--peer", "tunix=/no/such/python"], "not an executable file"),
        (["--cores", "9999"], "--cores 9999"),
        (["--preset", "qwen9"], "qwen9"),
        (["--only", OURS, "checkpoint=/no/such/folder"], "/no/such/folder"),
        (["--python312", "/bin/false", "--install", "x", "--only", "maxtext"], "no Python 3.12"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert cli.main(["bench", "model", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("remend: error: ") and error.count("\n") == 1
    assert says in error


def test_who_has_no_interpreter_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.bench.model._measure", lambda *_: ({}, {}))
    assert cli.main(["bench", "model", "--only", "easydel", "--only", OURS]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "easydel is left out" in lines[0] and "--peer easydel=" in lines[0]


def test_environments_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def fake(command: list[str], log: Path) -> None:
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(installing, "_run", fake)
    monkeypatch.setattr(installing, "_is_312", lambda python: False)
    said: list[str] = []
    names = ["remend", "tunix", "maxtext"]
    pythons = installing.install(tmp_path, names, None, said.append)
    assert pythons == {"tunix": tmp_path / "tunix" / "bin" / "python"}
    assert len(ran) == 2 and str(SCRIPTS / "tunix.txt") in ran[1]
    assert any("--python312" in line for line in said)
    assert installing.install(tmp_path, names, None, said.append) == pythons
    assert len(ran) == 2  # nothing done again
    (tmp_path / "tunix" / installing.DONE).write_text("of other pins")
    installing.install(tmp_path, names, None, said.append)
    assert len(ran) == 4


def test_every_peer_has_its_script_and_its_pins() -> None:
    assert all(script_of(name).is_file() for name in PEERS)
    for name in installing.PINS:
        lines = (SCRIPTS / f"{name}.txt").read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins and all("==" in pin for pin in pins)
