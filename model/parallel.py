"""What the devices of a mesh tell each other inside a compiled step.

A training step is written for one device's part of everything and mapped over the mesh with
``jax.shard_map`` (``sft/learner.py``). So every collective of the step is one of these calls, at a
place that can be read; there are no others. On an axis that the mesh does not have, or outside a
``shard_map``, each of them does nothing.

The derivative of a call is the collective that mathematics asks for when the objective is the sum
over all devices of what each one computes: ``gather`` and ``scatter_sum`` are each other's.

Both have two forms, and ``_in_front`` chooses: XLA for TPUs turns some scatters into a sum of
everything and a slice, twice the bytes (``tests/tools/plan/test_collectives.py`` counts them).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# The mesh axes by role, outermost first: neighbours in the last one are neighbours on the network.
SLICE = "slice"  # TPU slices, joined by the data-centre network: rows
DATA = "data"  # rows; parameters are whole on each
FSDP = "fsdp"  # rows, and parameters: gathered where they are used
CONTEXT = "context"  # tokens of a row, and parameters like fsdp
TENSOR = "tensor"  # heads, hidden units and vocabulary; tokens between the matrix products
AXES = (SLICE, DATA, FSDP, CONTEXT, TENSOR)

ROWS = (SLICE, DATA, FSDP)  # what rows of a batch are split over
WEIGHTS = (FSDP, CONTEXT)  # what the ``embed`` side of every matrix is split over


def here(axes: tuple[str, ...] | str) -> tuple[str, ...]:
    """Those of the axes that this program is mapped over, and that are longer than one."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = (axes,) if isinstance(axes, str) else axes
    return tuple(a for a in axes if a in mesh.manual_axes and mesh.shape[a] > 1)


def count(axes: tuple[str, ...] | str) -> int:
    """Devices along the axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in here(axes))


def index(axes: tuple[str, ...] | str) -> jax.Array | int:
    """This device's number along the axes, the first axis counting most."""
    axes = here(axes)
    return jax.lax.axis_index(axes) if axes else 0


def gather(x: jax.Array, axes: tuple[str, ...] | str, dim: int) -> jax.Array:
    """Every device's x, one behind the other along ``dim``."""
    axes = here(axes)
    if not axes:
        return x
    if not _in_front(x, axes, dim):
        return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    pieces = jnp.moveaxis(jax.lax.all_gather(x, axes), 0, dim)
    return pieces.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def scatter_sum(x: jax.Array, axes: tuple[str, ...] | str, dim: int) -> jax.Array:
    """This device's piece along ``dim`` of the sum of every device's x."""
    axes = here(axes)
    if not axes:
        return x
    if not _in_front(x, axes, dim):
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    pieces = x.reshape(*x.shape[:dim], count(axes), -1, *x.shape[dim + 1 :])
    return jax.lax.psum_scatter(jnp.moveaxis(pieces, dim, 0), axes)


def _in_front(x: jax.Array, axes: tuple[str, ...], dim: int) -> bool:
    """Whether the devices get an axis of their own before all others.

    Then matrices are scattered without padding, and so are the tokens of one row. Those of several
    rows must stay where they are, or all of them are summed.
    """
    return axes != (TENSOR,) or math.prod(x.shape[:dim]) == 1


def total(x: jax.Array, axes: tuple[str, ...] | str) -> jax.Array:
    """The sum of every device's x."""
    axes = here(axes)
    return jax.lax.psum(x, axes) if axes else x


def highest(x: jax.Array, axes: tuple[str, ...] | str) -> jax.Array:
    """The largest of every device's x, number by number. Not differentiable."""
    axes = here(axes)
    return jax.lax.pmax(x, axes) if axes else x


def exchange(x: jax.Array, axes: tuple[str, ...] | str, split: int, join: int) -> jax.Array:
    """Piece i along ``split`` goes to device i; what comes in is joined along ``join``."""
    axes = here(axes)
    if not axes:
        return x
    return jax.lax.all_to_all(x, axes, split_axis=split, concat_axis=join, tiled=True)


def own(x: jax.Array, axes: tuple[str, ...] | str, dim: int) -> jax.Array:
    """This device's piece along ``dim`` of an x that all hold."""
    if not here(axes):
        return x
    size = x.shape[dim] // count(axes)
    return jax.lax.dynamic_slice_in_dim(x, index(axes) * size, size, dim)
