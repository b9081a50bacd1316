"""A run with a mesh never holds more of a policy on a device than that device's share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from model.config import preset
from model.decode import check_room

WORKER = Path(__file__).with_name("on_start.py")


def test_a_device_holds_its_share_and_an_export_is_the_same_from_every_mesh(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    env["JAX_NUM_CPU_DEVICES"] = "8"
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exports are equal" in done.stdout
    print(done.stdout)
    words = done.stdout.split()
    share, small, start, training, result = (
        int(words[words.index(name) + 1])
        for name in ("share", "small", "start", "training", "result")
    )
    assert share > 3 * small
    assert start <= share + small
    assert training <= 3 * share + small  # weights and two moments, and no second start
    assert result <= share + small


def test_a_policy_that_no_device_holds_is_not_served() -> None:
    """Weights 32.76e9 x 4 bytes = 122.0 GiB; a token's keys and values in 64 layers of 8 heads of
    128, bfloat16, 256 KiB: for 4 x 32768 tokens 32 GiB."""
    model = preset("qwen3-32b", param_dtype="float32", dtype="bfloat16")
    with pytest.raises(InputError, match=r"on one device: with 4 slots of 32768 .* 154\.0 GiB"):
        check_room(model, 4, 32_768, room=95 << 30)
    check_room(model, 4, 32_768, room=155 << 30)
