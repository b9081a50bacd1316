"""The programs of a training run, lowered for a mesh of devices that need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rl.loss import loss_of_rows
from sft.learner import Learner, nll
from sft.packing import empty_rows
from tools.plan.job import Job

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.stages import Lowered

STEP, REFERENCE = "step", "reference"
_STEPS = 1000  # updates that the learning rate is scheduled for: a constant of the program


@dataclass(frozen=True)
class Planned:
    """A program to be compiled.

    runs: executions in an update.
    loops: trips of its loops that depend on data.
    """

    name: str
    lowered: Lowered
    runs: int
    loops: Mapping[str, int] = field(default_factory=dict)


def programs(job: Job, mesh: Mesh) -> list[Planned]:
    """The optimisation step and, where there is a reference policy, its log-probabilities.

    Raises InputError as ``Learner`` does.
    """
    learner = Learner(
        job.model,
        job.optimizer.build(_STEPS),
        loss_of_rows(job.loss) if job.loss else nll,
        mesh,
        job.temperature,
    )
    rows = empty_rows(
        job.microbatch_rows, job.tokens, job.targets
    )  # zeros, of no memory until read
    # as Learner.step has it: compiled for a power of two, run as often as there are microbatches
    compiled_for = 1 << (job.microbatches - 1).bit_length()
    step, logprobs = learner.lower(rows, compiled_for)
    out = [Planned(STEP, step, 1, {"": job.microbatches})]
    if job.reference:
        out.append(Planned(REFERENCE, logprobs, job.microbatches))
    return out
