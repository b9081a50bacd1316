"""kill -9 in the middle of training, then the same command again: the same bits as uninterrupted.

The other resume tests interrupt by an exception; here a real process dies at an arbitrary moment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def start(script: str, run: Path) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script + SAVE, str(run)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


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
