"""`remend study`: what it refuses, what it would do, and that a killed one goes on."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.schema import load
from sandbox.base import SandboxBroken
from sandbox.task import Task
from sandbox.verdict import Verdict
from tests.tools.hosts import ROOT
from tests.tools.test_bad_input import refused
from tests.tools.test_hosts import Site, prepare
from tools import study_exploit
from tools.cli import main
from tools.study import StudyConfig
from tools.study_jobs import Job, Study

CONFIGS = ROOT / "configs" / "study"
MICRO = CONFIGS / "micro.yaml"


def study(out: Path, *overrides: str, config: Path = MICRO) -> Study:
    return Study(load(StudyConfig, config, list(overrides)), config.parent, out)


@pytest.mark.parametrize("name", ["micro", "miniature", "paper-32b"])
def test_the_shipped_studies_are_taken(tmp_path: Path, name: str) -> None:
    found = study(tmp_path / "out", config=CONFIGS / f"{name}.yaml")
    names = [job.name for job in found.jobs]
    assert len(set(names)) == len(names) == len({job.mark for job in found.jobs})
    assert not (tmp_path / "out").exists()


def test_the_miniature_is_within_its_budget(tmp_path: Path) -> None:
    found = study(tmp_path / "out", config=CONFIGS / "miniature.yaml")
    left, untimed = found.left()
    assert untimed == 0 and left <= 3600 * found.config.budget_hours <= 3 * 3600


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seeds=[0, 0]", "seeds"),
        ("seeds=[]", "seeds"),
        ("environments=[half]", "environments"),
        ("exploit.seeds=[3]", "exploit.seeds"),
        ("environments=[full]", "simplified"),
        ("set=[rl.stepz=3]", "did you mean rl.steps"),
        ("exploit.set=[rl.row_tokens=8]", "rl.row_tokens"),
        ("thinking=[agent.thinking=true, agent.max_new_tokens=700]", "row_targets"),
        ("set=[teach.teacher=dataset, teach.dataset=here]", "teach.teacher=dataset"),
        ("exploit.set=[teach.teacher=dataset]", "teach.teacher=dataset"),
        ("base=nowhere.yaml", "nowhere.yaml"),
        ("budget_hours=0.001", "budget_hours is 0.001"),
        ("budget_hours=9", "expected_s"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, says: str
) -> None:
    overrides = [override]
    if "0.001" in override:
        kinds = ("teach", "sft", "rl", "cell", "shift", "tasks", "start", "long")
        overrides.append("expected_s={" + ", ".join(f"{k}: 9" for k in kinds) + "}")
    out = tmp_path / "out"
    assert says in refused(capsys, "study", str(MICRO), "--out", str(out), *overrides)
    assert not out.exists()


def test_plan_lists_the_jobs_in_an_order_in_which_each_finds_what_it_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["study", str(MICRO), "--out", str(tmp_path / "out"), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    names = [job["name"] for job in plan["jobs"]]
    place = names.index
    assert place("teach full-seed0") < place("sft full-seed0") < place("rl full-seed0")
    assert place("rl full-seed0") < place("rl-from-full-in-simplified-seed0")
    assert place("exploit tasks") < place("exploit start-seed0") < place("exploit off-seed0")
    assert plan["left_s"] == 0 and plan["untimed"] == len(names) and plan["done"] == 0


def fake(found: Study, die_at: int = -1) -> list[str]:
    """Jobs that only note that they ran; the one numbered `die_at` fails."""
    ran: list[str] = []

    def work(number: int, name: str) -> Any:
        async def run() -> dict[str, Any]:
            if number == die_at:
                raise RuntimeError("killed")
            ran.append(name)
            return {"seconds": 7.0}

        return run

    found.jobs = [Job(j.kind, j.name, j.mark, work(n, j.name)) for n, j in enumerate(found.jobs)]
    return ran


def test_a_job_that_is_done_is_not_done_again_and_times_come_from_those_that_are(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    first = study(out)
    ran = fake(first, die_at=9)
    with pytest.raises(RuntimeError):
        asyncio.run(first.run())
    assert ran == [job.name for job in first.jobs[:9]]
    again = study(out, "expected_s={shift: 1, tasks: 1, start: 1, long: 1}")
    assert [job.done for job in again.jobs] == [n < 9 for n in range(len(again.jobs))]
    cells = sum(job.kind == "cell" and not job.done for job in again.jobs)
    assert again.left() == (7.0 * cells + 6, 0)  # of two shifts, tasks, start and two long runs
    more = fake(again)
    with pytest.raises((KeyError, TypeError)):  # the cells hold no rows
        asyncio.run(again.run())
    assert [*ran, *more] == [job.name for job in again.jobs]


def test_a_folder_of_another_study_is_refused_but_not_for_another_budget(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study(out)._keep_config()
    study(out, "budget_hours=5", "expected_s={rl: 3}")._keep_config()
    with pytest.raises(InputError, match="another config"):
        study(out, "seeds=[0, 1]")._keep_config()
    # too few tempting tasks were found: more may be wanted until they are made
    study(out, "exploit.tasks=9")._keep_config()
    (out / "exploit").mkdir()
    (out / "exploit" / "tasks.json").touch()
    study(out, "exploit.tasks=9")._keep_config()
    with pytest.raises(InputError, match="another config"):
        study(out, "exploit.tasks=10")._keep_config()


def test_an_exploit_is_counted_only_where_the_tests_held_back_were_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def judge(*_: Any) -> Verdict:
        return Verdict("error", {"a": "passed"}, {"b": "missing"}, (), 1.0)

    monkeypatch.setattr(study_exploit, "judge", judge)
    named = {field.name: "x" for field in fields(Task) if field.type == "str"}
    task = Task(**named, fail_to_pass=("a",), pass_to_pass=(), python_path=(), protected=())  # type: ignore[arg-type]
    with pytest.raises(SandboxBroken, match=task.name):
        asyncio.run(study_exploit._passes(task, ("b",), "", None))  # type: ignore[arg-type]


def test_a_damaged_mark_is_named(tmp_path: Path) -> None:
    found = study(tmp_path / "out")
    mark = found.jobs[0].mark
    mark.parent.mkdir(parents=True)
    mark.write_text("{")
    with pytest.raises(InputError, match="teach.json"):
        found.left()


def run(out: Path) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.cli", "study", str(MICRO), "--out", str(out), "--json"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.service
@pytest.mark.timeout(1800)
def test_a_study_killed_in_the_middle_of_its_jobs_goes_on_to_its_report(tmp_path: Path) -> None:
    """kill -9 in an RL training, and in a cell's evaluation: what was done is not done again."""
    out = tmp_path / "study"
    for wait in (
        "train/simplified-seed0/trajectories/rl-000001.jsonl",
        "cells/base-*/trajectories",
    ):
        process = run(out)
        while not list(out.glob(wait)):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = {path: path.read_bytes() for path in out.glob("*/*/*.json") if path.parent.is_dir()}
        times = {path: path.stat().st_mtime_ns for path in done}
    process = run(out)
    text, _ = process.communicate()
    assert process.returncode == 0
    found = json.loads(text)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["key"] for row in found["claims"]] == [
        "student", "gain", "transfer", "thinking", "exploitation", "tools",
    ]  # fmt: skip
    assert all(row["ours"] is not None for row in found["claims"])
    assert len(found["cells"]) == len(study(out).cells)
    assert found["exploitation"]["episodes"]["off"] == found["exploitation"]["episodes"]["on"] > 0
    assert (out / "report.html").stat().st_size > 100_000
    again = run(out)  # nothing is left to do
    assert json.loads(again.communicate()[0])["claims"] == found["claims"]
    shutil.rmtree(out)


@pytest.mark.service
@pytest.mark.timeout(900)
def test_a_study_on_two_hosts_gives_what_it_gives_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)
    monkeypatch.setenv("REMEND_CACHE", site.environment["REMEND_CACHE"])
    prepare(tmp_path)
    (tmp_path / "run.yaml").rename(tmp_path / "base.yaml")
    (tmp_path / "run.yaml").write_text(
        "base: base.yaml\nset: [rl.steps=1, sft.epochs=2]\n"
        "environments: [simplified]\nexploit: {seeds: []}\n"
    )
    rows = []
    for hosts in (2, 1):
        out = f"study-{hosts}"
        for process in site.start("study", out, hosts=hosts):
            _, said = process.communicate()
            assert process.returncode == 0, said[-2000:]
        found = json.loads((tmp_path / out / "study.json").read_text())
        assert (tmp_path / out / "report.html").exists()
        rows.append([(row["cell"], row["tasks"]) for row in found["cells"]])
    assert len(rows[0]) == 4 and rows[0] == rows[1]
