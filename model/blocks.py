"""The tensors of a parameter on the host, a bounded block of rows at a time, from any layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.parallel import gather, index, total

BLOCK_BYTES = 256 << 20  # gathered at a time: what every device and the host hold of a tensor


def blocks(
    leaf: Any, at: tuple[int, ...], axis: int, *, fetch: bool = True, limit: int = BLOCK_BYTES
) -> Iterator[np.ndarray]:
    """The tensor ``leaf[at]`` cut along its ``axis`` into blocks of at most ``limit`` bytes.

    A parameter that lies on several hosts is gathered by all of them together, block by block.

    Args:
        leaf: an array of JAX, split over a mesh or not; or of numpy, which is given as it is.
        fetch: False where this host only helps others to gather; then nothing is given.
    """
    if not isinstance(leaf, jax.Array) or _on_one_cpu(leaf):
        if fetch:
            yield np.asarray(leaf)[at]  # a view
        return
    leaf = _on_a_mesh(leaf)
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    shape = leaf.shape[len(at) :]
    length = shape[axis] // block_parts(mesh, spec, len(at), axis)
    count = block_rows(shape, leaf.dtype, axis, length, limit)
    for part in range(shape[axis] // length):
        for start in range(0, length, count):
            first = min(start, length - count)  # the last one begins early: one shape, one program
            where = np.asarray((*at, part, first), np.int32)
            got = gather_block(leaf, where, mesh=mesh, spec=spec, axis=axis, count=count)
            if not fetch:
                got.block_until_ready()  # or blocks of many would wait on the device
                continue
            rows = [slice(None)] * len(shape)
            rows[axis] = slice(start - first, None)
            yield np.asarray(got.addressable_data(0))[tuple(rows)]


def block_parts(mesh: Mesh, spec: PartitionSpec, lead: int, axis: int) -> int:
    """Pieces that the rows of a tensor lie in; ``lead``: axes of the parameter before its own."""
    assert not any(_axes(spec, i) for i in range(lead)), f"layers are split: {spec}"
    return math.prod(mesh.shape[name] for name in _axes(spec, lead + axis))


def block_rows(
    shape: tuple[int, ...], dtype: Any, axis: int, length: int, limit: int = BLOCK_BYTES
) -> int:
    """Rows of a block of a tensor, of whose rows ``length`` lie together."""
    row = math.prod(shape) // shape[axis] * np.dtype(dtype).itemsize
    return min(length, max(1, limit // row))


@functools.partial(jax.jit, static_argnames=("mesh", "spec", "axis", "count"))
def gather_block(
    leaf: jax.Array, where: jax.Array, *, mesh: Mesh, spec: PartitionSpec, axis: int, count: int
) -> jax.Array:
    """``count`` rows of a tensor, whole on every device.

    Args:
        leaf: the parameter, laid out on ``mesh`` as ``spec`` says.
        where: int32 [k + 2]: the entry of its first k axes, the piece of the tensor's rows, and the
            first row within that piece.
    """

    def own(x: jax.Array, where: jax.Array) -> jax.Array:
        lead = len(where) - 2
        for i in range(lead):
            x = jax.lax.dynamic_index_in_dim(x, where[i], 0, keepdims=False)
        x = jax.lax.dynamic_slice_in_dim(x, where[-1], count, axis)
        if over := _axes(spec, lead + axis):
            # one device's bits and zeros: as floats, -0.0 + 0.0 would lose its sign
            kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
            bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
            bits = total(jnp.where(index(over) == where[-2], bits, 0), over)
            x = jax.lax.bitcast_convert_type(bits.astype(kind), x.dtype)
        for dim in range(x.ndim):
            if dim != axis and (over := _axes(spec, lead + dim)):
                x = gather(x, over, dim)
        return x

    whole = PartitionSpec()
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(spec, whole), out_specs=whole, check_vma=False)
    return mapped(leaf, where)


def _axes(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """The mesh axes that a dimension is split over."""
    names = spec[dim] if dim < len(spec) else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def _on_one_cpu(leaf: jax.Array) -> bool:
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"


def _on_a_mesh(leaf: jax.Array) -> jax.Array:
    if isinstance(leaf.sharding, NamedSharding):
        return leaf
    (device,) = leaf.devices()
    mesh = jax.make_mesh((1,), ("one",), devices=[device])
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
