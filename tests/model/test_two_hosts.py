"""Two real processes of two devices each read what one process wrote, and write what one reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from model.checkpoint import Checkpoints
from model.hf import INDEX, load_hf, save_hf
from model.orbax_folder import load_orbax
from tests.model.conftest import SMALL, random_params

HOST = """
import sys, threading
from pathlib import Path
import jax
folder, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
from model.checkpoint import Checkpoints
from model.hf import fetched, load_hf, save_hf
from model.hosts import agree, beside
from model.orbax_folder import load_orbax, save_orbax
from model.sharding import make_mesh, param_shardings
mesh = make_mesh({"fsdp": 4})
policy = load_hf(folder / "start", shardings=lambda config: param_shardings(config, mesh))
assert not policy.params["layers"]["q"].is_fully_addressable
save_hf(folder / "written", policy.params, policy.config, shard_bytes=20_000)
copied = fetched(policy.params, policy.config, shard_bytes=20_000)
def write():
    with beside("snapshots"):
        save_hf(folder / "beside", copied, policy.config, shard_bytes=20_000)
thread = threading.Thread(target=write)
thread.start()
for turn in range(50):
    assert agree((turn, process)) == [[turn, 0], [turn, 1]]
thread.join()
save_orbax(folder / "orbax", policy.params, policy.config)
checkpoints = Checkpoints(folder / "checkpoints")
restored = checkpoints.restore(1, {"params": policy.params})["params"]  # written by one process
assert restored["layers"]["q"].sharding == policy.params["layers"]["q"].sharding
checkpoints.save(3, {"params": restored})
checkpoints.close()
"""


def test_hosts_and_one_process_read_each_others_files(tmp_path: Path):
    params = random_params(SMALL, 0)
    save_hf(tmp_path / "start", params, SMALL)
    alone = Checkpoints(tmp_path / "checkpoints")
    alone.save(1, {"params": params})
    alone.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(tmp_path), port, str(process)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        errors = [host.communicate(timeout=240)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)

    assert (tmp_path / "written" / INDEX).is_file()  # several files, each written by one host
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    read = [
        load_hf(tmp_path / "written").params,  # checks every digest in the manifest
        load_hf(tmp_path / "beside").params,
        load_orbax(tmp_path / "orbax").params,
        checkpoints.restore(3, {"params": params})["params"],
    ]
    checkpoints.close()
    for tree in read:
        np.testing.assert_array_equal(tree["embed"], params["embed"])
        for name, value in params["layers"].items():
            np.testing.assert_array_equal(tree["layers"][name], value)
