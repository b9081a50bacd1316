"""One training step gives the same numbers on every mesh."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from model.config import preset
from model.sharding import check_mesh

WORKER = Path(__file__).with_name("on_meshes.py")


def _start(*args: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the time would be compiling
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


LATER = pytest.mark.service


@pytest.mark.parametrize(
    "what",
    ["meshes", pytest.param("random", marks=LATER), pytest.param("losses", marks=LATER)],
)
def test_eight_devices_compute_what_one_does(what, tmp_path):
    done = _start(tmp_path, what)
    out = done.communicate(timeout=600)[0]
    assert done.returncode == 0, out[-3000:]
    assert out.count("agrees") >= 6


@pytest.mark.service
def test_two_processes_of_four_devices_compute_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [_start(tmp_path, "hosts", port, process) for process in range(2)]
    try:
        outs = [host.communicate(timeout=600)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outs[0][-2000:] + outs[1][-2000:]
    assert all(out.count("agrees") >= 8 for out in outs)


@pytest.mark.parametrize(
    ("sizes", "kwargs", "message"),
    [
        ({"tensor": 16}, {}, "num_key_value_heads = 8 does not divide over tensor = 16: "
                             "nearest legal 8"),
        ({"fsdp": 3}, {}, "embed of embed = 5120 does not divide over fsdp x context = 3: "
                          "nearest legal 2 or 4"),
        ({"data": 4, "fsdp": 4}, {"rows": 24}, "24 rows .* = 16: nearest are 16 and 32"),
        ({"context": 4, "tensor": 2}, {"tokens": 1001}, "multiple of 8, e.g. 1008"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_explained(sizes, kwargs, message):
    with pytest.raises(InputError, match=message):
        check_mesh(preset("qwen3-32b"), sizes, **kwargs)
