"""plan.json: a job's costs as plain data, bytes in GiB where the name says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from model.hf_names import rows_axis, tensors
from model.sharding import param_specs
from tools.plan.costs import FULL, Costs, Part
from tools.plan.figures import Traffic
from tools.plan.memory import BYTES, GIB
from tools.plan.programs import EXPORT, largest_tensor


def summary(costs: Costs, estimate: Costs) -> dict[str, Any]:
    """What was measured, and beside it what the formulas say.

    The numbers at the top are of one update: HBM of the program that needs most, FLOPs, bytes and
    seconds of all executions of all programs, on one device (on v7x half a chip).
    """
    job, largest = costs.job, costs.largest
    by_name = {part.name: part for part in estimate.parts}
    terms = costs.terms
    return {
        "fits": costs.fits,
        "stage": job.stage,
        "topology": job.slice.name,
        "devices": job.mesh.devices,
        "mesh": job.mesh.sizes,
        "model": {
            "parameters": job.model.num_parameters,
            "layers": job.model.num_hidden_layers,
            "dtype": job.model.dtype,
            "param_dtype": job.model.param_dtype,
            "remat": job.model.remat,
            "attention": job.model.attention,
        },
        "rows": job.rows,
        "microbatch_rows": job.microbatch_rows,
        "row_tokens": job.tokens,
        "hbm_gib": {
            **_hbm(largest),
            "capacity": costs.capacity / GIB,
            "limit": FULL * costs.capacity / GIB,
            "program": largest.name,
            "estimate": _hbm(by_name[largest.name]),
        },
        "flops_per_chip": costs.flops,
        "flops_expected": costs.flops_done,
        "flops_model": costs.flops_model,
        "collectives": _collectives(costs.parts),
        "step_s": {**terms, "bound": max(terms, key=lambda name: terms[name])},
        "least_s": costs.seconds,
        "mfu_ceiling": costs.mfu_ceiling,
        "tokens_per_s": costs.tokens_per_s,
        "export": _export(costs),
        "compile_s": sum(part.figures.compile_s for part in costs.parts),
        "cached": costs.cached,
        "programs": [_program(part, by_name.get(part.name)) for part in costs.parts],
        "notes": _notes(costs),
    }


def _hbm(part: Part) -> dict[str, float]:
    """``arguments`` with all that lies there besides; they and the temporaries are the total."""
    found = part.figures
    return {
        "arguments": (part.resident + found.arguments + found.outputs - found.aliased) / GIB,
        "temporaries": found.temporaries / GIB,
        "total": part.hbm / GIB,
        "host": found.host / GIB,
    }


def _program(part: Part, estimate: Part | None) -> dict[str, Any]:
    found = part.figures
    terms = found.terms
    return {
        "name": part.name,
        "runs": part.runs,
        "hbm_gib": {**_hbm(part), "estimate": estimate and _hbm(estimate)},
        "flops_per_chip": found.flops,
        "flops_attention": found.attention_flops,
        "flops_expected": part.flops_done,
        "flops_model": part.flops_model,
        "hbm_bytes": found.hbm_bytes,
        "step_s": {**terms, "bound": max(terms, key=lambda name: terms[name])},
        "collectives": [_row(row, row.op) for row in found.collectives],
        "compile_s": found.compile_s,
    }


def _row(row: Traffic, op: str) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "axes": list(row.axes),
        "link": row.link,
        "devices": row.devices,
        "count": row.count,
        "bytes": row.sent,
        "seconds": row.seconds,
        "dtype": row.dtype,
        "op": op,
    }


def _collectives(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Of an update, by kind, axes and link; ``bytes`` are those that a device sends."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for traffic in part.figures.collectives:
            row = _row(traffic, "")
            key = (row["kind"], traffic.axes, row["link"])
            have = rows.setdefault(
                key,
                {k: row[k] for k in ("kind", "axes", "link", "devices")}
                | {"count": 0.0, "bytes": 0.0, "seconds": 0.0},
            )
            for name in ("count", "bytes", "seconds"):
                have[name] += part.runs * row[name]
    return sorted((row for row in rows.values() if row["count"]), key=lambda row: -row["bytes"])


def _export(costs: Costs) -> dict[str, Any]:
    """A snapshot: block by block, each tensor is made whole on every device and written.

    ``bytes``: that a device sends for all of them: a sum over those that rows are split over, of
    which one holds a block's, then a gather over those that columns are.
    """
    job, part = costs.job, next(part for part in costs.parts if part.name == EXPORT)
    specs = param_specs(job.model, job.mesh.sizes)
    stored, sent = BYTES[job.model.param_dtype], 0.0
    for tensor in tensors(job.model):
        spec: Any = specs
        for key in tensor.path:
            spec = spec[key]
        own = [jax.tree.leaves(axes) for axes in tuple(spec)[len(tensor.at) :]]
        shards = [math.prod(job.mesh.sizes[axis] for axis in axes) for axes in own]
        rows, columns = shards.pop(rows_axis(tensor)), math.prod(shards)
        words = math.prod(tensor.shape)
        sent += 2 * words * 4 / columns * (rows - 1) / rows  # summed as 32-bit integers
        sent += words * stored * (columns - 1) / columns
    return {
        "largest": largest_tensor(job).name,
        "hbm_gib": part.hbm / GIB,
        "bytes": sent,
        "block_bytes": part.figures.sent,
        "block_s": part.figures.ici_s + part.figures.dcn_s,
    }


def _notes(costs: Costs) -> list[str]:
    found = {f"{part.name}: {note}": None for part in costs.parts for note in part.figures.notes}
    for part in costs.parts:
        if not part.runs and part.hbm > FULL * costs.capacity:
            found[f"{part.name} does not fit: {part.hbm / GIB:.2f} GiB"] = None
    if costs.largest.figures.hbm > costs.capacity:
        found["the compiler gave up for want of memory: the figures are of its last attempt"] = None
    return list(found)
