"""Meshes, and the one table that says which mesh axis each logical axis is split over."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs.errors import InputError
from model.config import Qwen3Config
from model.qwen3 import Params, abstract, logical_axes

# Logical axis -> mesh axis. An axis that is not here, or whose mesh axis the mesh does not have,
# is not split. Rows of a batch are split over both: fsdp devices are data-parallel too.
RULES: Mapping[str, str] = {"embed": "fsdp"}
BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh from sizes by axis name, e.g. {"data": 2, "fsdp": 4}; uses the first devices.

    Raises InputError for an unknown axis or more devices than there are.
    """
    unknown = set(axes) - set(BATCH_AXES)
    if unknown:
        raise InputError(f"mesh: unknown axis {sorted(unknown)[0]!r}; there are {BATCH_AXES}")
    count = int(np.prod(list(axes.values())))
    if count > jax.device_count():
        raise InputError(f"mesh {dict(axes)} needs {count} devices, here are {jax.device_count()}")
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:count],
    )


def data_mesh(devices: int) -> Mesh:
    """The mesh of plain data parallelism."""
    return make_mesh({"data": devices})


def param_shardings(config: Qwen3Config, mesh: Mesh) -> Params:
    """The sharding of every parameter under RULES, as the tree of ``model.qwen3.init``.

    An axis that its mesh axis does not divide evenly is left whole.
    """

    def one(axes: tuple[str, ...], spec: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [RULES.get(axis) for axis in axes]
        fits = [
            name if name in mesh.shape and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, spec.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(
        one, logical_axes(config), abstract(config), is_leaf=lambda x: isinstance(x, tuple)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over every data-parallel axis of the mesh, whatever follows whole."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def simulate_devices(count: int) -> None:
    """Make one CPU look like ``count`` devices. Before JAX's first use; later it is an InputError.

    No effect where JAX runs on accelerators, or for a count of 1.
    """
    if count == 1:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if jax.local_device_count("cpu") != count:
            raise InputError(
                f"{count} simulated devices were asked for after JAX had started"
            ) from None
