"""Parameters filled from checkpoint files by threads, where they will stay."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.hf_names import Tensor
from model.tensorfile import Entry, read_into

Sources = list[tuple[Tensor, Entry]]  # of one parameter, in order of their index


class Filler:
    """Threads that fill parameters from files."""

    def __init__(self, dtype: np.dtype, progress: Callable[[int], None]) -> None:
        self._dtype, self._progress, self._done = dtype, progress, 0
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "read")

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(
        self, shape: tuple[int, ...], sources: Sources, sharding: NamedSharding | None
    ) -> Callable[[], jax.Array]:
        """Begin to fill one parameter [*shape]; the returned function waits for it.

        ``sharding`` None: the default device.
        """
        if sharding is None:
            device = jax.local_devices()[0]
            if device.platform == "cpu":  # filled where it stays: nothing is copied
                out = _aligned(shape, self._dtype)
                wait = self._fill(sources, out, None)

                def finish() -> jax.Array:
                    wait()
                    return jax.device_put(out, device)

                return finish
            sharding = NamedSharding(
                jax.make_mesh((1,), ("one",), devices=[device]), PartitionSpec()
            )
        return functools.partial(self._on_mesh, shape, sources, sharding)

    def _on_mesh(
        self, shape: tuple[int, ...], sources: Sources, sharding: NamedSharding
    ) -> jax.Array:
        """One parameter on accelerators; each host reads what its own devices hold."""
        layers = shape[0] if sources[0][0].at else 0
        if not layers:
            return self._sharded(shape, sources, sharding)
        # layer by layer into the stack on the device, so that the host holds one layer's part
        inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        stack = jax.jit(lambda: jnp.zeros(shape, self._dtype), out_shardings=sharding)()
        put = jax.jit(_put_layer, donate_argnums=0, out_shardings=sharding)
        each = len(sources) // layers
        for i in range(layers):
            part = self._sharded(shape[1:], sources[i * each : (i + 1) * each], inner)
            stack = put(stack, part, i)
        return stack

    def _sharded(
        self,
        shape: tuple[int, ...],
        sources: Sources,
        sharding: NamedSharding,
    ) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            out = _aligned(tuple(sizes), self._dtype)
            self._fill(sources, out, index)()
            return out

        return jax.make_array_from_callback(shape, sharding, read)

    def _fill(
        self, sources: Sources, out: np.ndarray, index: tuple[slice, ...] | None
    ) -> Callable[[], None]:
        """Read all sources, or of each (for a layer's experts: of each that it names) a part."""
        rank = len(sources[0][1].shape)
        targets = out.reshape(-1, *out.shape[out.ndim - rank :])
        part: tuple[slice, ...] = ()
        if index is not None:
            if len(index) > rank:
                sources = sources[index[0]]
            part = index[len(index) - rank :]
        jobs = [
            self._pool.submit(
                read_into,
                entry,
                target,
                transposed=tensor.transposed,
                part=part[::-1] if tensor.transposed else part,
            )
            for (tensor, entry), target in zip(sources, targets, strict=True)
        ]

        def wait() -> None:
            for job, (_, entry) in zip(jobs, sources, strict=True):
                job.result()
                self._done += entry.nbytes
                self._progress(self._done)

        return wait


def _put_layer(stack: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, i, 0)


_MADV_POPULATE_WRITE = 23  # <linux/mman.h>, since 5.14; Python has no name for it


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros at an address that XLA:CPU takes over without a copy.

    Its pages are there at once, and huge, where the system can do so: one fault for each small page
    would take as long as reading does, and a transpose writes to many pages at a time.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # an older kernel, or not Linux
        raw.madvise(mmap.MADV_HUGEPAGE)
        raw.madvise(_MADV_POPULATE_WRITE)
    return np.frombuffer(raw, np.uint8, size).view(dtype).reshape(shape)
