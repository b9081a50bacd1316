"""All programs of a job, compiled or by formula, with what lies on the device beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.plan.cache import keep, key_of, recall
from tools.plan.expected import expected, flops_on_device
from tools.plan.figures import Figures, measured
from tools.plan.job import Job
from tools.plan.memory import GIB
from tools.plan.placement import Placement
from tools.plan.programs import EXPORT, REFERENCE, STEP, names, programs
from tools.plan.topology import devices, placement

FULL = 0.9  # of the chip's memory: a program that takes more is not said to fit


@dataclass(frozen=True)
class Part:
    """One program of a job.

    runs: executions in an update.
    resident: bytes on the device that are no arguments of it.
    flops_model, flops_done: by formula, of one execution on one device.
    """

    name: str
    runs: int
    figures: Figures
    resident: float
    flops_model: float
    flops_done: float

    @property
    def hbm(self) -> float:
        """Bytes in use at the fullest moment."""
        return self.figures.hbm + self.resident


@dataclass(frozen=True)
class Costs:
    """What an update of a job costs one device."""

    job: Job
    parts: tuple[Part, ...]
    cached: bool = False

    @property
    def capacity(self) -> float:
        """Bytes of HBM."""
        return self.job.slice.chip.hbm_gib * GIB

    @property
    def largest(self) -> Part:
        """The program of an update that needs most memory."""
        return max((part for part in self.parts if part.runs), key=lambda part: part.hbm)

    @property
    def fits(self) -> bool:
        """Whether all do, those too that are no part of an update."""
        return all(part.hbm <= FULL * self.capacity for part in self.parts)

    @property
    def terms(self) -> dict[str, float]:
        """Seconds that each part of the machine needs for an update."""
        of = self.parts[0].figures.terms
        return {n: sum(p.runs * p.figures.terms[n] for p in self.parts) for n in of}

    @property
    def seconds(self) -> float:
        """No update is shorter: in each program the slowest part of the machine is waited for."""
        return sum(p.runs * max(p.figures.terms.values()) for p in self.parts)

    @property
    def flops(self) -> float:
        return sum(p.runs * p.figures.flops for p in self.parts)

    @property
    def flops_model(self) -> float:
        return sum(p.runs * p.flops_model for p in self.parts)

    @property
    def flops_done(self) -> float:
        """By formula."""
        return sum(p.runs * p.flops_done for p in self.parts)

    @property
    def mfu_ceiling(self) -> float:
        """The model's FLOPs over what the chip could do in ``seconds``."""
        return self.flops_model / (self.seconds * self.job.slice.chip.tflops * 1e12)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.job.rows * self.job.tokens / self.seconds


def compiled(job: Job, say: Callable[[str], None]) -> Costs:
    """Compile what was not compiled before. ``say`` gets lines for a person.

    Raises InputError as ``Job.check`` does, and MissingExtra without libtpu.
    """
    from model.sharding import make_mesh

    job.check()
    keys = {name: key_of(job, name) for name in names(job)}
    found = {name: recall(key) for name, key in keys.items()}
    missing = [name for name, figures in found.items() if figures is None]
    if missing:
        mesh = make_mesh(job.mesh, devices(job.slice))
        place = placement(mesh, job.slice)
        for program in programs(job, mesh):
            if program.name in missing:
                say(f"compiling {program.name} for {job.slice.name}")
                figures = measured(program.lowered, place, job.slice, program.loops)
                found[program.name] = figures
                keep(keys[program.name], figures)
    return _costs(job, {name: f for name, f in found.items() if f}, cached=not missing)


def by_formula(job: Job, place: Placement) -> Costs:
    """The same without compiling. The job must have been checked."""
    return _costs(job, expected(job, place))


def _costs(job: Job, figures: dict[str, Figures], *, cached: bool = False) -> Costs:
    # one program's arguments stay where they are while the other runs
    resident = {
        STEP: figures[REFERENCE].arguments if job.reference else 0.0,
        REFERENCE: figures[STEP].arguments,
    }
    if EXPORT in figures:  # its argument is one of the step's
        resident[EXPORT] = sum(resident.values()) - figures[EXPORT].arguments
    parts = []
    for name, found in figures.items():
        model = done = 0.0
        if name != EXPORT:
            model, done = flops_on_device(job, training=name == STEP)
        runs = {STEP: 1, REFERENCE: job.microbatches, EXPORT: 0}[name]
        parts.append(Part(name, runs, found, resident[name], model, done))
    return Costs(job, tuple(parts), cached)
