"""The real MaxText, on its own Python: load or make a model, give its logits, save its checkpoint.

Run as ``python maxtext_peer.py JOBS.json``: a list of jobs, done one after the other since
importing MaxText takes longer than most of them. A job has

    flags    a MaxText config file
    args     key=value for the command line
    load     a path for load_parameters_path, or null: fresh parameters, moved off their start
    ids      .npy of token ids [B, T]
    logits   .npy to write, float32 [B, T, V]
    save     {kind: folder to write}: "training" (parameters, optimizer state, ...) or "params"
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.common import checkpointing
from maxtext.common.train_state_nnx import TrainStateNNX
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils

# Where and how it runs; what the model is comes from the job.
RUN = {
    "run_name": "peer",
    "hardware": "cpu",
    "attention": "dot_product",
    "matmul_precision": "highest",
    "enable_checkpointing": "false",
    "skip_jax_distributed_system": "true",
    "log_config": "false",
    "dataset_type": "synthetic",
}


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        ids = jnp.asarray(np.load(job["ids"]))
        rows, length = ids.shape
        run = RUN | {"per_device_batch_size": rows, "max_target_length": length} | job["args"]
        if job["load"]:
            run["load_parameters_path"] = job["load"]
        config = pyconfig.initialize(["", job["flags"], *(f"{k}={v}" for k, v in run.items())])
        mesh = maxtext_utils.get_mesh_from_config(config)
        with mesh, logical_axis_rules(config.logical_axis_rules):
            model = loaded(config, mesh) if job["load"] else fresh(config, mesh)
            np.save(job["logits"], logits(model, ids))
            for kind, folder in job["save"].items():
                save(kind, folder, model, config)


def fresh(config: Any, mesh: Any) -> nnx.Module:
    """A model none of whose parameters is what it was initialised to."""
    model = model_creation_utils.create_model(config, mesh, rngs=rngs())
    noise = np.random.default_rng(3)
    state = nnx.state(model, nnx.Param)
    for _, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        variable.set_value(value + 0.2 * jnp.asarray(noise.normal(size=value.shape), value.dtype))
    nnx.update(model, state)
    return model


def loaded(config: Any, mesh: Any) -> nnx.Module:
    """The model that MaxText's post-training code loads, after comparing it with the one that its
    training code loads: they are different code."""
    model = model_creation_utils.from_pretrained(config, mesh=mesh)

    def start() -> TrainStateNNX:
        empty = model_creation_utils.create_model(config, mesh, rngs=rngs())
        return TrainStateNNX(empty, nnx.Optimizer(empty, optax.adamw(1e-3), wrt=nnx.Param))

    state = maxtext_utils.setup_training_state(None, config, mesh, None, start)[0]
    trained = nnx.state(state.model if hasattr(state, "model") else state["model"], nnx.Param)
    for (path, a), (other, b) in zip(
        nnx.to_flat_state(nnx.state(model, nnx.Param)), nnx.to_flat_state(trained), strict=True
    ):
        assert path == other and bits(a) == bits(b), f"MaxText's two loaders differ at {path}"
    return model


def bits(variable: nnx.Variable) -> bytes:
    return np.asarray(variable.get_value()).tobytes()


def rngs() -> nnx.Rngs:
    return nnx.Rngs(params=0, dropout=1, aqt=2)


def logits(model: nnx.Module, ids: jax.Array) -> np.ndarray:
    """[B, T, V] float32."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out = model(ids, positions, decoder_segment_ids=jnp.ones_like(ids), enable_dropout=False)
    return np.asarray(out, np.float32)


def save(kind: str, folder: str, model: nnx.Module, config: Any) -> None:
    """With MaxText's own functions: a training run's checkpoint, or parameters alone."""
    if kind == "params":
        params = nnx.state(model, nnx.Param).to_pure_dict()
        checkpointing.save_params_to_path(folder, {"params": params})
        return
    state = TrainStateNNX(model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param))
    manager = checkpointing.create_orbax_checkpoint_manager(folder, True, False, 1)
    checkpointing.save_checkpoint(manager, 0, nnx.state(state), config, force=True)
    checkpointing.wait_until_finished(manager)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
