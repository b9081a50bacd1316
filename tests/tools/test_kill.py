"""kill -9 in the middle of training, then the same command again: the same bits as uninterrupted.

The other resume tests interrupt by an exception; here a real process dies at an arbitrary moment.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.runs import steps_of

ROOT = Path(__file__).resolve().parent.parent.parent
SFT = """
import runpy, sys
from pathlib import Path
t = runpy.run_path("tests/sft/test_train.py")
import dataclasses
config = dataclasses.replace(t["CONFIG"], epochs=6)
start = t["init"](t["MODEL"], 0)
params = t["train_sft"](config, t["MODEL"], start, t["data"](), Path(sys.argv[1]), seed=3)
"""
RL = """
import runpy, sys
from pathlib import Path
t = runpy.run_path("tests/rl/test_train.py")
params = t["train"](Path(sys.argv[1]))
"""
SAVE = """
import jax, numpy as np
np.savez(sys.argv[1] + "/final.npz", *jax.tree.leaves(params))
"""
# Every file that Python opens, moves, makes or removes in the run folder is a point to die at, just
# before; the last line says how many there were.
POINTS = """
import os, signal, sys
reached, at = 0, int(os.environ["DIE_AT"])
def seen(event, args):
    global reached
    if event == "open" or event.startswith(("os.", "shutil.")):
        if any(isinstance(a, (str, os.PathLike)) and str(a).startswith(sys.argv[1]) for a in args):
            reached += 1
            if reached == at:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(seen)
"""
COUNT = """
print(reached)
"""


def start(script: str, run: Path) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script + SAVE, str(run)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def run_to(script: str, run: Path, *, point: int = 0, seconds: float = 600) -> tuple[int, str]:
    """Run until it ends, or dies at a point or after some time; its code and what it printed.

    What was compiled is kept beside the run folder: a start would be little else.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "DIE_AT": str(point),
        "JAX_COMPILATION_CACHE_DIR": str(run.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", POINTS + script + SAVE + COUNT, str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    return process.returncode, out


def episodes_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "trajectories").glob("*.jsonl")}


@pytest.mark.parametrize(("script", "at"), [(SFT, 5), (RL, 3)], ids=["sft", "rl"])
def test_kill_9_and_again_gives_the_same_bits(tmp_path: Path, script: str, at: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(script, whole).wait(timeout=120) == 0
    process = start(script, cut)
    deadline = time.monotonic() + 120
    while len(steps_of(cut)) < at:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert at <= len(steps_of(cut)) < len(steps_of(whole))
    assert start(script, cut).wait(timeout=120) == 0
    assert steps_of(cut) == steps_of(whole)
    assert (cut / "final.npz").read_bytes() == (whole / "final.npz").read_bytes()


@pytest.mark.service
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", [SFT, RL], ids=["sft", "rl"])
def test_killed_at_ten_random_points_it_is_the_same_run(tmp_path: Path, script: str) -> None:
    """Half the deaths are at a file of the run folder, half at a moment. What is there after each
    is the beginning of the undisturbed run; a run that ends in spite of them is followed by a new
    one. REMEND_SEED repeats a failure, but for the moments."""
    seed = int(os.environ.get("REMEND_SEED") or secrets.randbits(31))
    print(f"REMEND_SEED={seed}")
    rng = np.random.default_rng(seed)
    whole = tmp_path / "whole"
    code, out = run_to(script, whole)
    assert code == 0
    points = int(out.split()[-1])
    began = time.monotonic()
    assert run_to(script, tmp_path / "again")[0] == 0  # compiled already: what a start takes
    duration = time.monotonic() - began
    kills, runs, died = 0, 0, []
    while True:
        cut = tmp_path / f"cut-{runs}"
        if kills == 10:
            where, code = "the end", run_to(script, cut)[0]
            assert code == 0
        elif kills % 2:
            after = rng.uniform(0, duration)
            where, code = f"{after:.2f} s", run_to(script, cut, seconds=after)[0]
        else:
            point = int(rng.integers(1, points // 2))
            where, code = f"point {point} of {points}", run_to(script, cut, point=point)[0]
        done = steps_of(cut)
        died.append(f"{where}: {len(done)} steps")
        print(died[-1])
        assert done == steps_of(whole)[: len(done)]
        if code == 0:
            assert done == steps_of(whole)
            assert episodes_of(cut) == episodes_of(whole)
            assert (cut / "final.npz").read_bytes() == (whole / "final.npz").read_bytes()
            runs += 1
            if kills == 10:
                return
        else:
            assert code == -signal.SIGKILL
            kills += 1
