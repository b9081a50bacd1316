"""What of a step is one host's: its rows of every batch, its devices' part of the parameters."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from configs.errors import InputError
from model.blocks import blocks
from model.config import Qwen3Config
from model.hosts import host_count, host_index
from model.parallel import ROWS
from model.qwen3 import Params
from model.sharding import param_shardings


def spread(params: Params, config: Qwen3Config, mesh: Mesh | None) -> Params:
    """Parameters that every host holds whole, laid out over the devices of all.

    JAX's own ``device_put`` refuses what lies on a device already.
    """
    if host_count() == 1 or mesh is None:
        return params

    def one(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if not leaf.is_fully_addressable:  # spread already
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, params, param_shardings(config, mesh))


def whole(params: Params) -> Params:
    """The same parameters where one device of this host can take each leaf whole: what lies on
    devices of other hosts too is gathered into memory, by all hosts together."""

    def one(leaf: jax.Array) -> jax.Array | np.ndarray:
        if leaf.is_fully_addressable:
            return leaf
        return np.concatenate(list(blocks(leaf, (), 0)))

    return jax.tree.map(one, params)


@dataclass(frozen=True)
class Share:
    """Which part of every batch's rows a host feeds to its devices.

    Attributes:
      part, parts: rows [part * n, (part + 1) * n) of a batch of parts * n.
      peers: all hosts that feed this very part, this one among them: several where a model is
        split over the devices of several hosts.
    """

    part: int = 0
    parts: int = 1
    peers: tuple[int, ...] = (0,)

    def rows(self, of_batch: int) -> int:
        """This host's rows of a batch. Raises InputError if they cannot be dealt out evenly."""
        if of_batch % self.parts:
            raise InputError(
                f"microbatch_rows must be a multiple of {self.parts}, the hosts that share the "
                f"rows of a batch; got {of_batch}"
            )
        return of_batch // self.parts


def share_of(mesh: Mesh | None) -> Share:
    """This host's share of the rows of a batch on `mesh`, whose rows lie along the axes ROWS."""
    if mesh is None:
        return Share()
    lead = mesh.devices.shape[: len(ROWS)]
    assert mesh.axis_names[: len(ROWS)] == ROWS
    blocks = mesh.devices.reshape(-1, *mesh.devices.shape[len(lead) :])
    held: dict[int, set[int]] = {host: set() for host in range(host_count())}
    for row, devices in enumerate(blocks):
        for device in devices.flat:
            held[device.process_index].add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(rows) for rows in parts}) > 1 or sum(map(len, parts)) != len(blocks):
        raise InputError(
            f"mesh: {len(blocks)} groups of rows cannot be dealt out evenly to {host_count()} "
            "hosts: let slice x data x fsdp be a multiple of the hosts, or divide them"
        )
    own = tuple(sorted(held[host_index()]))
    peers = tuple(host for host, rows in held.items() if tuple(sorted(rows)) == own)
    return Share(parts.index(own), len(parts), peers)
