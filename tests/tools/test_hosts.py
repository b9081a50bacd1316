"""Two real processes train together through the command line, are killed, preempted and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from model.hf import load_hf
from sft.trajectory import load
from tests.runs import steps_of
from tests.tools.hosts import ROOT, prepare
from tools import cli

STOPS_WITHIN_S = 60  # what a dead host may cost the others, by contract


class Site:
    """A folder that all hosts see, with everything a run needs, and the processes started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "REMEND_CACHE": str(folder / "cache"),
            # every process here compiles the same programs, which takes most of its time
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.started: list[subprocess.Popen] = []

    def start(self, verb: str, run: str, *more: str, hosts: int = 2) -> list[subprocess.Popen]:
        """The verb on so many hosts; on one without any flags."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "tools.cli", verb, "run.yaml", "--out", run, *more]
        several = ["--coordinator", where, "--hosts", str(hosts), "--host"]
        flags = [[*several, str(host)] for host in range(hosts)] if hosts > 1 else [[]]
        processes = [
            subprocess.Popen(
                [*command, *one],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for one in flags
        ]
        self.started += processes
        return processes

    def finish(self, verb: str, run: str, *more: str, hosts: int = 2) -> None:
        for process in self.start(verb, run, *more, hosts=hosts):
            errors = process.communicate(timeout=240)[1]
            assert process.returncode == 0, errors


def wait(processes: list[subprocess.Popen], ready: Callable[[], bool]) -> None:
    """Until `ready`, with all processes running."""
    deadline = time.monotonic() + 240
    while not ready():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("hosts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMEND_CACHE", site.environment["REMEND_CACHE"])
        prepare(site.folder)
    yield site
    for process in site.started:
        process.kill()


@pytest.fixture(scope="module")
def whole(site: Site) -> Path:
    """SFT on two hosts from beginning to end."""
    site.finish("sft", "whole")
    return site.folder / "whole"


def begin(site: Site, whole: Path, run: str, steps: int) -> list[subprocess.Popen]:
    """SFT under way on two hosts, behind so many updates."""
    (site.folder / run / "trajectories").mkdir(parents=True)
    shutil.copy(whole / "trajectories" / "teacher.jsonl", site.folder / run / "trajectories")
    processes = site.start("sft", run)
    wait(processes, lambda: len(steps_of(site.folder / run)) >= steps)
    return processes


def weights(run: Path) -> bytes:
    return (run / "snapshots" / "sft" / "model.safetensors").read_bytes()


def assert_close(run: Path, whole: Path) -> None:
    """The same batches in the same order, and the same result but for rounding."""
    for one, other in zip(steps_of(run), steps_of(whole), strict=True):
        assert (one["step"], one["sft/tokens"]) == (other["step"], other["sft/tokens"])
        for name in ("sft/loss", "sft/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    for a, b in zip(_leaves(run), _leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def _leaves(run: Path) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(load_hf(run / "snapshots" / "sft").params)


def test_two_hosts_get_what_one_gets(site: Site, whole: Path) -> None:
    """Also from the teacher, whose episodes they shared out."""
    site.finish("sft", "one", hosts=1)
    runs = site.folder / "one", whole
    episodes = [load(run / "trajectories" / "teacher.jsonl") for run in runs]
    assert len(episodes[0]) == 16
    for a, b in zip(*episodes, strict=True):
        assert (a.task, a.seed, a.ids, a.reward) == (b.task, b.seed, b.ids, b.reward)
    assert_close(site.folder / "one", whole)


@pytest.mark.service
def test_a_dead_host_ends_the_other_and_both_resume_to_the_same_bits(
    site: Site, whole: Path
) -> None:
    run = site.folder / "killed"
    processes = begin(site, whole, "killed", 8)
    processes[1].kill()
    _, errors = processes[0].communicate(timeout=STOPS_WITHIN_S)
    assert processes[0].returncode == 70
    assert "remend: error: host 0 stops: no sign of host 1 for" in errors.splitlines()[-1]
    assert len(steps_of(run)) < len(steps_of(whole))
    site.finish("sft", "killed")
    assert weights(run) == weights(whole)
    assert steps_of(run) == steps_of(whole)


@pytest.mark.service
def test_without_host_0_the_other_ends_in_a_rollout_too(site: Site) -> None:
    processes = site.start("teach", "rollout", "teach.tries=500")
    partial = site.folder / "rollout" / "trajectories" / "teacher.jsonl.host-1.partial"
    wait(processes, lambda: partial.exists())
    processes[0].kill()
    _, errors = processes[1].communicate(timeout=STOPS_WITHIN_S)
    assert processes[1].returncode == 70
    assert "remend: error: host 1 stops: JAX has lost touch with host 0" in errors.splitlines()[-1]


@pytest.mark.service
def test_sigterm_on_one_host_saves_and_the_same_command_goes_on(site: Site, whole: Path) -> None:
    """On as many hosts to the same bits, on another number through the same batches."""
    run, alone = site.folder / "preempted", site.folder / "alone"
    processes = begin(site, whole, "preempted", 8)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], errors
    done, of = len(steps_of(run)), len(steps_of(whole))
    assert done < of
    line = f"remend: stopped by SIGTERM: SFT has saved update {done} of {of}"
    assert all(line in error.splitlines()[-1] for error in errors)
    assert (run / "checkpoints" / "sft" / str(done)).is_dir()
    shutil.copytree(run, alone)
    site.finish("sft", "preempted")
    assert weights(run) == weights(whole)
    site.finish("sft", "alone", hosts=1)
    assert_close(alone, whole)


@pytest.mark.service
def test_rl_on_two_hosts(site: Site) -> None:
    """Each rolls out its groups, both learn from all, and what is published is whole."""
    shipped = str(ROOT / "model" / "policies" / "tiny")
    site.finish("rl", "rl", f"policy={shipped}", "sft.epochs=1")
    run = site.folder / "rl"
    steps = [line for line in steps_of(run) if line["phase"] == "rl"]
    assert [line["step"] for line in steps] == [1, 2]
    assert steps[0]["rl/grad_norm"] > 0
    for number, line in enumerate(steps):
        parts = [
            load(run / "trajectories" / f"rl-{number + 1:06d}.host-{host}-of-2.jsonl")
            for host in range(2)
        ]
        assert [len(part) for part in parts] == [4, 2]  # whole groups of two
        done = [episode for part in parts for episode in part]
        assert len({episode.seed for episode in done}) == 6
        assert {episode.weight_version for episode in done} == {number}
        assert line["rl/reward"] == pytest.approx(np.mean([episode.reward for episode in done]))
    for name in ("v000001", "v000002", "rl"):
        load_hf(run / "snapshots" / name)  # checks every digest in the manifest
    assert weights(run) != (run / "snapshots" / "rl" / "model.safetensors").read_bytes()


@pytest.mark.service
def test_rollouts_run_ahead_on_two_hosts_and_go_on_after_a_sigterm(site: Site) -> None:
    """The first host rolls out for both; no token is too old, no step is lost, and every snapshot
    that was written is whole."""
    shipped = str(ROOT / "model" / "policies" / "tiny")
    more = [f"policy={shipped}", "sft.epochs=1", "rl.steps=8", "rl.max_staleness=2"]
    more += ["rl.weight_cap=2", "rl.tasks_per_step=2", "rl.checkpoint_every=50"]
    run = site.folder / "ahead"

    def steps() -> list[dict]:
        return [line for line in steps_of(run) if line["phase"] == "rl"]

    processes = site.start("rl", "ahead", *more)
    wait(processes, lambda: (run / "metrics.jsonl").exists() and len(steps()) >= 2)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], errors
    assert 2 <= len(steps()) < 8
    site.finish("rl", "ahead", *more)
    assert [line["step"] for line in steps()] == list(range(1, 9))
    assert any(line["rl/grad_norm"] > 0 for line in steps())
    for number, line in enumerate(steps()):
        done = load(run / "trajectories" / f"rl-{number + 1:06d}.jsonl")
        assert len(done) == 4
        assert line["rl/reward"] == pytest.approx(np.mean([episode.reward for episode in done]))
        ages = [number - v for episode in done for v in episode.versions if v >= 0]
        assert min(ages) >= 0 and max(ages) <= 2
    for snapshot in (run / "snapshots").glob("v*"):
        load_hf(snapshot)
    final = [run / "snapshots" / name / "model.safetensors" for name in ("v000008", "rl")]
    assert final[0].read_bytes() == final[1].read_bytes()


@pytest.mark.service
def test_a_snapshot_that_cannot_be_written_ends_all_hosts(site: Site) -> None:
    """The first host alone knows of the budget, in a thread beside the learner."""
    shipped = str(ROOT / "model" / "policies" / "tiny")
    more = [f"policy={shipped}", "sft.epochs=1", "rl.max_staleness=1", "rl.weight_cap=2"]
    processes = site.start("rl", "no-room", *more, "server.sglang.snapshot_gib=0.001")
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "raise server.sglang.snapshot_gib" in errors[0].splitlines()[-1]
    assert "host 1 stops: host 0 has failed" in errors[1].splitlines()[-1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--hosts", "2"],
        ["--hosts", "2", "--host", "0"],
        ["--coordinator", "here", "--hosts", "2", "--host", "0"],
        ["--coordinator", "here:1", "--hosts", "2", "--host", "2"],
        ["--coordinator", "here:1", "--hosts", "none", "--host", "0"],
        ["--coordinator", "here:1", "--hosts", "auto", "--host", "0"],
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sft", "run.yaml", "--out", str(tmp_path / "run"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("remend: error: ") and "--host" in line or "--coordinator" in line
