"""Meshes, and the one table that says which mesh axes each logical axis is split over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs.errors import InputError
from model.config import Qwen3Config
from model.parallel import AXES, CONTEXT, ROWS, SLICE, TENSOR, WEIGHTS
from model.qwen3 import Params, abstract, logical_axes

# Logical axis of a parameter -> mesh axes; an axis that is not here is not split. ``embed`` is the
# exception in vectors: norms are too small to be worth a collective and stay whole.
RULES: Mapping[str, tuple[str, ...]] = {
    "embed": WEIGHTS,
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis (``model/parallel.py`` says what each is for).

    topology: the chips it is meant for, e.g. "v5p:4x4x4", what ``remend plan`` compiles for.
    """

    slice: int = 1
    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    topology: str = ""

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1:
                raise InputError(f"mesh: {axis} must be positive, got {size}")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis, outermost first."""
        return {axis: asdict(self)[axis] for axis in AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())


def make_mesh(axes: Mapping[str, int] | MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from sizes by axis name, e.g. {"data": 2, "fsdp": 4}, the others 1.

    Args:
        devices: all are used; None takes the first of those that JAX has. Neighbours on a TPU's
            torus become neighbours on the inner axes; ``slice`` runs over slices.

    Raises InputError for an unknown axis or another number of devices than there are.
    """
    sizes = axes.sizes if isinstance(axes, MeshConfig) else dict(axes)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise InputError(f"mesh: unknown axis {unknown[0]!r}; there are {', '.join(AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    needed = math.prod(shape)
    if devices is None:
        devices = jax.devices()[:needed]
    if len(devices) != needed:
        text = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, shape, strict=True) if n > 1)
        raise InputError(f"mesh {text or 'of one'} needs {needed} devices, here are {len(devices)}")
    return Mesh(_laid_out(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    from jax.experimental import mesh_utils

    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = shape[AXES.index(SLICE)]
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(
                shape, devices=devices, allow_split_physical_axes=True
            )
        return mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]),
            (slices, *[1] * (len(shape) - 1)),
            devices=devices,
            allow_split_physical_axes=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"mesh {shape}: {str(error).splitlines()[0]}") from None


def data_mesh(devices: int) -> Mesh:
    """The mesh of plain data parallelism."""
    return make_mesh({"data": devices})


def param_specs(config: Qwen3Config, sizes: Mapping[str, int]) -> Params:
    """The PartitionSpec of every parameter under RULES, as the tree of ``model.qwen3.init``.

    ``sizes``: devices by axis; an axis that is not there, or is one device, splits nothing.
    """

    def one(axes: tuple[str, ...]) -> PartitionSpec:
        own = [axis for axis in axes if axis != "layers"]
        vector = len(own) == 1

        def split(axis: str) -> tuple[str, ...] | None:
            if vector and axis == "embed":
                return None
            return tuple(a for a in RULES.get(axis, ()) if sizes.get(a, 1) > 1) or None

        return PartitionSpec(*(split(axis) for axis in axes))

    return jax.tree.map(one, logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))


def param_shardings(config: Qwen3Config, mesh: Mesh) -> Params:
    """``param_specs`` on the mesh. Raises InputError as ``check_mesh`` does."""
    check_mesh(config, mesh.shape)
    specs = param_specs(config, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def check_mesh(
    config: Qwen3Config,
    sizes: Mapping[str, int],
    *,
    rows: int | None = None,
    tokens: int | None = None,
) -> None:
    """Refuse a mesh that something does not divide over evenly.

    Args:
        sizes: devices by axis.
        rows, tokens: of a microbatch, over all devices.

    Raises InputError naming what does not divide, the axis, and the sizes that would.
    """
    tensor = sizes.get(TENSOR, 1)
    for what, size in (
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.num_key_value_heads),
    ):
        _divides(size, tensor, what, TENSOR)
    shapes = jax.tree_util.tree_leaves_with_path(abstract(config))
    axes = jax.tree.leaves(logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    for (path, spec), names in zip(shapes, axes, strict=True):
        for name, size in zip(names, spec.shape, strict=True):
            over = RULES.get(name, ())
            if name == "embed" and len([n for n in names if n != "layers"]) == 1:
                continue
            parts = math.prod(sizes.get(axis, 1) for axis in over)
            where = f"{name} of {jax.tree_util.keystr(path, simple=True, separator='.')}"
            _divides(size, parts, where, " x ".join(over))
    if rows is not None:
        parts = math.prod(sizes.get(axis, 1) for axis in ROWS)
        if rows % parts:
            near = [n for n in (rows // parts * parts, -(-rows // parts) * parts) if n]
            raise InputError(
                f"mesh: {rows} rows of a microbatch do not divide over {' x '.join(ROWS)} = "
                f"{parts}: nearest are {' and '.join(map(str, sorted(set(near))))}"
            )
    if tokens is not None:
        # the ring of context attention cuts each device's tokens in two
        parts = sizes.get(CONTEXT, 1) * math.lcm(tensor, 2 if sizes.get(CONTEXT, 1) > 1 else 1)
        if tokens % parts:
            raise InputError(
                f"mesh: rows of {tokens} tokens do not divide over context x tensor: use a "
                f"multiple of {parts}, e.g. {-(-tokens // parts) * parts}"
            )


def _divides(size: int, parts: int, what: str, over: str) -> None:
    if size % parts == 0:
        return
    legal = [n for n in range(1, size + 1) if size % n == 0]
    below = max(n for n in legal if n < parts)
    above = [n for n in legal if n > parts]
    near = f"{below} or {above[0]}" if above else f"{below}"
    raise InputError(
        f"mesh: {what} = {size} does not divide over {over} = {parts}: nearest legal {near}"
    )


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
