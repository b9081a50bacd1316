"""Which mesh, remat policy and microbatch are best for a model on a slice.

All that are legal are ranked by formula; the best few are compiled, and the best of these is it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from configs.errors import InputError
from model.parallel import CONTEXT, DATA, FSDP, TENSOR
from model.sharding import MeshConfig, make_mesh
from tools.plan.chips import Slice
from tools.plan.costs import Costs, by_formula, compiled
from tools.plan.job import Job
from tools.plan.memory import GIB
from tools.plan.placement import Placement
from tools.plan.summary import summary
from tools.plan.topology import devices, placement
from tools.progress import progress

REMATS = ("none", "dots", "attention", "full")  # from the fastest to the smallest
LONG = 32_768  # tokens of a row from which on it may be split
MOST_TENSOR = 16
SHOWN = 12  # rows of the ranking that are kept


def search(job: Job, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The summary of the best, with ``search``: the ranking, each row with both figures.

    Args:
        count: how many of the best by formula are compiled; more only where none of them fits.

    Raises InputError if nothing is legal, or nothing fits by formula.
    """
    if count < 1:
        raise InputError(f"--compile must be positive, got {count}")
    ranking = ranked(job)
    say(f"{len(ranking)} choices fit by formula; the best {min(count, len(ranking))} are compiled")
    found: list[Costs] = []
    for costs in ranking[: 2 * count]:
        if len(found) >= count and any(c.fits for c in found):
            break
        say(" ".join(overrides(costs.job)))
        found.append(compiled(costs.job, say))
    best = min(found, key=lambda c: (not c.fits, *_speed(c)))
    which = next(i for i, costs in enumerate(found) if costs is best)
    plan = summary(best, ranking[which])
    plan["choice"] = overrides(best.job)
    plan["search"] = [
        {
            "choice": overrides(guess.job),
            "estimate": _brief(guess),
            "compiled": made and _brief(made),
        }
        for guess, made in itertools.islice(itertools.zip_longest(ranking, found), SHOWN)
    ]
    return plan


def ranked(job: Job) -> list[Costs]:
    """Every choice that fits by formula, the fastest first.

    Raises InputError where there is none.
    """
    place = places(job.slice)
    fitting, smallest = [], None
    candidates = list(choices(job))
    if not candidates:
        raise InputError(
            f"no mesh of {job.slice.devices} devices takes {job.rows} rows of {job.tokens} tokens: "
            "more rows, or fewer chips"
        )
    with progress("search") as report:
        for number, candidate in enumerate(candidates, 1):
            costs = by_formula(candidate, place(candidate.mesh))
            if costs.fits:
                fitting.append(costs)
            if smallest is None or costs.largest.hbm < smallest.largest.hbm:
                smallest = costs
            report(number, len(candidates), "")
    if not fitting:
        assert smallest is not None
        raise InputError(
            f"nothing fits {job.slice.name}: the least is {smallest.largest.hbm / GIB:.1f} GiB of "
            f"{smallest.capacity / GIB:.1f} ({' '.join(overrides(smallest.job))})"
        )
    return sorted(fitting, key=_speed)


def choices(job: Job) -> Iterator[Job]:
    """Legal meshes, remat policies and microbatches of a job's model, batch and slice."""
    for mesh in _meshes(job):
        attention = job.model.attention
        if mesh.context > 1:
            attention = CONTEXT
        elif attention == CONTEXT:
            attention = "splash"
        shards = mesh.slice * mesh.data * mesh.fsdp
        for remat in REMATS:
            model = replace(job.model, remat=remat, attention=attention)
            for rows in range(shards, job.rows + 1, shards):
                if job.rows % rows == 0:
                    choice = replace(job, mesh=mesh, model=model, microbatch_rows=rows)
                    if _legal(choice):
                        yield choice


def overrides(job: Job) -> list[str]:
    """What makes a run's config this choice."""
    sizes = {axis: n for axis, n in job.mesh.sizes.items()}
    return [
        *(f"mesh.{axis}={n}" for axis, n in sizes.items()),
        f"network.remat={job.model.remat}",
        f"network.attention={job.model.attention}",
        f"{job.stage}.microbatch_rows={job.microbatch_rows}",
    ]


def places(on: Slice) -> Callable[[MeshConfig], Placement]:
    """Where the devices of a mesh lie, remembered by mesh."""
    there = functools.cache(lambda: devices(on))

    @functools.cache
    def place(mesh: MeshConfig) -> Placement:
        return placement(make_mesh(mesh, there()), on)

    return place


def _meshes(job: Job) -> Iterator[MeshConfig]:
    on = job.slice
    each = on.devices // on.slices
    for tensor in _divisors(each):
        if tensor > MOST_TENSOR or job.model.num_key_value_heads % tensor:
            continue
        for context in _divisors(each // tensor):
            if context > 1 and job.tokens < LONG:
                continue
            for data in _divisors(each // tensor // context):
                fsdp = each // tensor // context // data
                sizes = {DATA: data, FSDP: fsdp, CONTEXT: context, TENSOR: tensor}
                yield MeshConfig(slice=on.slices, topology=on.name, **sizes)


def _legal(job: Job) -> bool:
    try:
        job.check()
    except InputError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _speed(costs: Costs) -> tuple[float, float, float]:
    """What is compared: the bound, then what must overlap to reach it, then memory."""
    return costs.seconds, math.fsum(costs.terms.values()), costs.largest.hbm


def _brief(costs: Costs) -> dict[str, Any]:
    return {
        "fits": costs.fits,
        "hbm_gib": costs.largest.hbm / GIB,
        "step_s": costs.terms,
        "least_s": costs.seconds,
        "mfu_ceiling": costs.mfu_ceiling,
    }
