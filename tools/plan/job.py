"""What a plan is of: a run's model, mesh and batch, checked before anything is compiled."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import load
from model.config import PRESETS, Qwen3Config
from model.parallel import AXES, CONTEXT, FSDP, SLICE
from model.sharding import MeshConfig, check_mesh
from rl.learning import RLConfig
from rl.loss import LossConfig
from sft.learner import OptimizerConfig
from tools.plan.chips import Slice, parse
from tools.run_config import RunConfig, policy_folder

MESHES = Path(__file__).resolve().parents[2] / "configs" / "mesh"
STAGES = ("sft", "rl")


@dataclass(frozen=True)
class Job:
    """One update of the learner on one slice.

    rows: of the whole update. In RL as many as there are episodes: none is packed with another.
    microbatch_rows, tokens, targets: shape of one gradient computation, over all devices.
    loss: of GRPO; None is SFT's negative log-likelihood.
    """

    model: Qwen3Config
    mesh: MeshConfig
    rows: int
    microbatch_rows: int
    tokens: int
    targets: int
    optimizer: OptimizerConfig
    loss: LossConfig | None = None
    temperature: float = 1.0

    @property
    def slice(self) -> Slice:
        """The chips."""
        return parse(self.mesh.topology)

    @property
    def stage(self) -> str:
        return "rl" if self.loss else "sft"

    @property
    def microbatches(self) -> int:
        """In an update."""
        return -(-self.rows // self.microbatch_rows)

    @property
    def reference(self) -> bool:
        """Whether a reference policy lies beside the one that is trained."""
        return bool(self.loss and self.loss.kl_coef)

    def check(self) -> None:
        """Raise InputError naming what does not fit what, and the nearest that would."""
        on, sizes = self.slice, self.mesh.sizes
        if self.mesh.slice != on.slices:
            raise InputError(
                f"mesh: slice = {self.mesh.slice}, but {on.name} has {on.slices}: "
                f"set mesh.slice={on.slices}"
            )
        if self.mesh.devices != on.devices:
            text = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1)
            raise InputError(
                f"mesh: {text or 'of one'} takes {self.mesh.devices} devices, {on.name} has "
                f"{on.devices}: {_resized(self.mesh, on)}"
            )
        check_mesh(self.model, sizes, rows=self.microbatch_rows, tokens=self.tokens)
        if self.mesh.context > 1 and self.targets:
            raise InputError(
                f"mesh: {CONTEXT} {self.mesh.context} splits each row's tokens, and targets are "
                f"listed by row: set {self.stage}.row_targets=0"
            )
        if self.rows % self.microbatch_rows and self.loss is None:
            near = [n for n in range(1, self.rows + 1) if self.rows % n == 0]
            near.sort(key=lambda n: abs(n - self.microbatch_rows))
            raise InputError(
                f"sft: batch_rows = {self.rows} is not a multiple of microbatch_rows = "
                f"{self.microbatch_rows}: nearest are {' and '.join(map(str, sorted(near[:2])))}"
            )


def read_job(
    path: Path, overrides: list[str], *, topology: str | None, stage: str | None, search: bool
) -> Job:
    """The job of a run's YAML file. It is not checked: ``Job.check`` does that.

    Args:
        topology: in place of the config's; with it comes the mesh that is shipped for it, if there
            is one and the overrides say nothing about the mesh.
        search: the mesh is still to be found.
        stage: "sft" or "rl"; None: rl where the config sets anything of it.

    Raises InputError for a config, a model or a topology that there is not.
    """
    config = load(RunConfig, path, overrides)
    chosen = search or any(o.startswith("mesh.") for o in overrides)
    mesh = _mesh(config.mesh, topology, chosen)
    model = replace(_model(config), lora=config.lora)
    if stage is None:
        stage = "sft" if config.rl == RLConfig() else "rl"
    if stage == "sft":
        s = config.sft
        return Job(
            model, mesh, s.batch_rows, s.microbatch_rows, s.row_tokens, s.row_targets, s.optimizer
        )
    r = config.rl
    return Job(
        model,
        mesh,
        # the largest share of a step's groups that an update gets
        -(-r.tasks_per_step // r.updates_per_step) * r.group_size,
        r.microbatch_rows,
        r.row_tokens,
        r.row_targets,
        r.optimizer,
        r.loss,
        config.agent.temperature,
    )


def _model(config: RunConfig) -> Qwen3Config:
    """The policy's config: of a folder, or of the published model of that name."""
    run: dict[str, Any] = {k: v for k, v in asdict(config.network).items() if v is not None}
    folder = policy_folder(config.policy)
    if (folder / "config.json").is_file():
        from model.hf import read_config

        return read_config(folder, **run)
    name = folder.name.lower()
    if name not in PRESETS:
        raise InputError(
            f"policy {config.policy!r} is neither a folder with a config.json nor one of "
            f"{', '.join(PRESETS)}"
        )
    return replace(PRESETS[name], **run)


def _mesh(own: MeshConfig, topology: str | None, chosen: bool) -> MeshConfig:
    """The mesh for a topology; ``chosen``: the overrides have said what it is to be."""
    wanted = topology or own.topology
    if not wanted:
        raise InputError("the config's mesh names no topology: --topology v5p-128, for example")
    on = parse(wanted)
    if chosen or (own.topology and parse(own.topology) == on):
        return replace(own, topology=on.name)
    for file in sorted(MESHES.glob("*.yaml")):
        shipped = load(RunConfig, file).mesh
        if shipped.topology and parse(shipped.topology) == on:
            return replace(shipped, topology=on.name)
    raise InputError(
        f"no mesh is shipped for {on.name}, {on.devices} devices: say how they share the work "
        f"(mesh.{SLICE}={on.slices} mesh.{FSDP}={on.devices // on.slices}), or --search for it"
    )


def _resized(mesh: MeshConfig, on: Slice) -> str:
    """One axis changed so that the mesh has the slice's devices, else all of them along fsdp."""
    for axis in (FSDP, *(a for a in AXES if a not in (FSDP, SLICE))):
        others = mesh.devices // mesh.sizes[axis]
        if on.devices % others == 0:
            return f"mesh.{axis}={on.devices // others} makes it that"
    rest = math.prod((on.devices,)) // on.slices
    return f"mesh.{FSDP}={rest} with the others 1 makes it that"
