"""TPU slices on a machine without one: libtpu's compiler knows their devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, MissingExtra
from tools.plan.chips import Slice
from tools.plan.placement import Placement

if TYPE_CHECKING:
    from jax.sharding import Mesh

_ENVIRONMENT = {
    # what libtpu would otherwise ask the cloud's metadata server, for minutes
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # a chip has one owner, but nobody owns one here: two plans may be made at the same time
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(wanted: Slice) -> list[Any]:
    """The JAX devices of the slices, to compile for; slice after slice.

    JAX itself is put on the CPU, unless ``JAX_PLATFORMS`` says otherwise: with libtpu installed it
    would look for a TPU. Raises MissingExtra without libtpu, InputError for a shape that libtpu
    does not know.
    """
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra("libtpu", "tpu") from None
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)

    import jax
    from jax.experimental import topologies

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    family = {"v7x": "tpu7x"}.get(wanted.chip.name, wanted.chip.name)
    name = f"{family}:{'x'.join(map(str, wanted.shape))}"
    options: dict[str, Any] = {}
    if wanted.slices > 1:
        options["num_slices"] = wanted.slices
    if wanted.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both TensorCores as one device, as the cloud has
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise InputError(f"topology {wanted.name}: libtpu says {error}") from None
    return list(found.devices)


def placement(mesh: Mesh, wanted: Slice) -> Placement:
    """Where the devices of a mesh over ``devices(wanted)`` lie."""
    flat = mesh.devices.flatten().tolist()
    return Placement(
        names=mesh.axis_names,
        sizes=mesh.devices.shape,
        ids=[d.id for d in flat],
        slices=[getattr(d, "slice_index", None) or 0 for d in flat],
        coords=[(*d.coords[: wanted.chip.torus], d.core_on_chip) for d in flat],
    )
