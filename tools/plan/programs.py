"""The programs of a training run, lowered for a mesh of devices that need not be here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from model.blocks import block_parts, block_rows, gather_block
from model.hf_names import Tensor, rows_axis, tensors
from model.qwen3 import abstract
from model.sharding import param_specs
from rl.loss import loss_of_rows
from sft.learner import Learner, nll
from sft.packing import empty_rows
from tools.plan.job import Job

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.stages import Lowered

STEP, REFERENCE, EXPORT = "step", "reference", "export"
_STEPS = 1000  # updates that the learning rate is scheduled for: a constant of the program


@dataclass(frozen=True)
class Planned:
    """A program to be compiled.

    runs: executions in an update; 0 where it is no part of one.
    loops: trips of its loops that depend on data.
    """

    name: str
    lowered: Lowered
    runs: int
    loops: Mapping[str, int] = field(default_factory=dict)


def programs(job: Job, mesh: Mesh) -> list[Planned]:
    """The optimisation step, where there is a reference policy its log-probabilities, and what
    an export does with a block of the largest tensor.

    Raises InputError as ``Learner`` does.
    """
    learner = Learner(
        job.model,
        job.optimizer.build(_STEPS),
        loss_of_rows(job.loss) if job.loss else nll,
        mesh,
        job.temperature,
        offload=job.optimizer.offload,
    )
    rows = empty_rows(
        job.microbatch_rows, job.tokens, job.targets
    )  # zeros, of no memory until read
    # as Learner.step has it: compiled for a power of two, run as often as there are microbatches
    compiled_for = 1 << (job.microbatches - 1).bit_length()
    step, logprobs = learner.lower(rows, compiled_for)
    out = [Planned(STEP, step, 1, {"shard_map/while": job.microbatches})]
    if job.reference:
        out.append(Planned(REFERENCE, logprobs, job.microbatches))
    return [*out, Planned(EXPORT, _export(job, mesh), 0)]


def names(job: Job) -> list[str]:
    """Of the programs of a job."""
    return [STEP, *[REFERENCE] * job.reference, EXPORT]


def largest_tensor(job: Job) -> Tensor:
    """The one of a checkpoint that takes most memory when it is whole."""
    return max(tensors(job.model), key=lambda tensor: math.prod(tensor.shape))


def _export(job: Job, mesh: Mesh) -> Lowered:
    """A block of the largest tensor made whole on every device, as ``model/hf.py`` writes it."""
    tensor = largest_tensor(job)
    leaf: Any = abstract(job.model)
    spec: Any = param_specs(job.model, job.mesh.sizes)
    for key in tensor.path:
        leaf, spec = leaf[key], spec[key]
    lead, axis = len(tensor.at), rows_axis(tensor)
    shape = leaf.shape[lead:]
    length = shape[axis] // block_parts(mesh, spec, lead, axis)
    held = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.ShapeDtypeStruct((lead + 2,), jnp.int32, sharding=whole)
    count = block_rows(shape, leaf.dtype, axis, length)
    return gather_block.lower(held, where, mesh=mesh, spec=spec, axis=axis, count=count)
