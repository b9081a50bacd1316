"""The safetensors format: headers checked whole, tensors read and written in pieces.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then raw
little-endian data without holes (https://github.com/huggingface/safetensors#format). Nothing here
holds more than a few MiB of a tensor, and nothing is memory-mapped: mapped pages would count as
this process's memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from configs.errors import InputError

DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_MAX_HEADER = 100_000_000  # the format's own limit
_CHUNK = 4 << 20  # bytes written at a time, and read at most
_CACHED, _ROWS = 1 << 20, 256  # bytes of a chunk that stays in a core's cache; rows at least
_BLOCK = 256  # side of the square that is transposed at a time, so that it stays in the cache


@dataclass(frozen=True)
class Entry:
    """One tensor in a file; ``offset`` is absolute, in bytes."""

    name: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.dtype.itemsize * math.prod(self.shape)


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, from its header alone.

    Raises InputError if the file is missing, is not safetensors (a pickle, say), is shorter or
    longer than its header says, or holds a tensor that is neither F32 nor BF16.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= min(size - 8, _MAX_HEADER) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        facts = [
            (name, fact["dtype"], tuple(map(int, fact["shape"])), *map(int, fact["data_offsets"]))
            for name, fact in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} is truncated or not a safetensors file ({size} bytes); weights in any other "
            "format (a pickle, say) are not read"
        ) from None
    found: dict[str, Entry] = {}
    for name, kind, shape, begin, end in facts:
        if kind not in DTYPES:
            raise InputError(f"{path}: tensor {name!r} has dtype {kind}, not F32 or BF16")
        entry = Entry(name, path, DTYPES[kind], shape, 8 + length + begin)
        if begin < 0 or min(shape, default=1) < 0 or end - begin != entry.nbytes:
            raise InputError(f"{path}: tensor {name!r} has {end - begin} bytes for shape {shape}")
        if 8 + length + end > size:
            raise InputError(f"{path} is truncated: tensor {name!r} ends after the file")
        found[name] = entry
    at = 8 + length
    for entry in sorted(found.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != at:
            raise InputError(f"{path}: tensor {entry.name!r} overlaps another or leaves a hole")
        at += entry.nbytes
    if at != size:
        raise InputError(f"{path} has {size} bytes, its header accounts for {at}")
    return found


def read_into(
    entry: Entry,
    out: np.ndarray,
    *,
    transposed: bool = False,
    part: tuple[slice, ...] = (),
) -> None:
    """Fill ``out`` with a tensor or a part of one, cast to out's dtype.

    Args:
        out: writable array of the shape of the part; with ``transposed`` (matrices only) of its
            transpose.
        part: slices of the *stored* axes; () is all of it. Only the rows it names are read.
    """
    full = tuple(slice(0, n) for n in entry.shape)
    bounds = [s.indices(n)[:2] for s, n in zip(part or full, entry.shape, strict=True)]
    if len(entry.shape) == 1:
        start, stop = bounds[0]
        raw = np.empty(stop - start, entry.dtype)
        with entry.path.open("rb", buffering=0) as file:
            _read(file, entry, start * entry.dtype.itemsize, raw)
        out[...] = raw
        return
    (top, bottom), (left, right) = bounds
    width = entry.shape[1]
    line = width * entry.dtype.itemsize
    rows = max(1, min(max(_CACHED // line, _ROWS), _CHUNK // line))
    buffer = _buffer(rows * width * entry.dtype.itemsize).view(entry.dtype).reshape(rows, width)
    with entry.path.open("rb", buffering=0) as file:
        for start in range(top, bottom, rows):
            count = min(rows, bottom - start)
            chunk = buffer[:count]
            _read(file, entry, start * width * entry.dtype.itemsize, chunk)
            here = slice(start - top, start - top + count)
            if transposed:
                _transpose(chunk[:, left:right], out[:, here])
            else:
                out[here] = chunk[:, left:right]


def write(
    path: Path,
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    fetch: Callable[[str], Iterable[tuple[np.ndarray, bool]]],
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Write a file and return its sha256.

    Args:
        tensors: (name, dtype, shape as stored), in the order in which the data goes.
        fetch: gives a tensor by name as one or more blocks of rows, and with each whether it is to
            be transposed on the way; it is called in order, and one block is held at a time.
        progress: called with the bytes written since the last call.
    """
    plan = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    at = 0
    for name, dtype, shape in plan:
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)
            progress(len(data))

        put(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in plan:
            left = math.prod(shape)
            for value, transposed in fetch(name):
                left -= value.size
                for piece in _pieces(value, transposed):
                    put(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data)
            assert left == 0, (name, shape)
        file.flush()
        if isinstance(path, Path):
            os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(value: np.ndarray, transposed: bool) -> Iterable[np.ndarray]:
    """Contiguous runs of rows of a tensor in the order in which it is stored."""
    if value.ndim == 1:
        yield value
        return
    rows, width = value.shape[::-1] if transposed else value.shape
    step = max(1, _CHUNK // (width * value.dtype.itemsize))
    for start in range(0, rows, step):
        if not transposed:
            yield value[start : start + step]
            continue
        piece = np.empty((min(step, rows - start), width), value.dtype)
        _transpose(value[:, start : start + step], piece)
        yield piece


def _transpose(source: np.ndarray, out: np.ndarray) -> None:
    """out = source.T, block by block: numpy's own copy of a transpose misses the cache."""
    same = source.dtype == out.dtype
    if same and source.dtype.itemsize == 2:  # bfloat16 is no native type of numpy's fast loops
        source, out = source.view(np.uint16), out.view(np.uint16)
    for i in range(0, source.shape[0], _BLOCK):
        for j in range(0, source.shape[1], _BLOCK):
            out[j : j + _BLOCK, i : i + _BLOCK] = source[i : i + _BLOCK, j : j + _BLOCK].T


_local = threading.local()


def _buffer(size: int) -> np.ndarray:
    """This thread's scratch bytes: memory that is used again costs no page faults."""
    held = getattr(_local, "buffer", None)
    if held is None or held.nbytes < size:
        held = _local.buffer = np.empty(size, np.uint8)
    return held[:size]


def _read(file: BinaryIO, entry: Entry, start: int, out: np.ndarray) -> None:
    """Fill a contiguous array with the tensor's bytes from ``start`` on."""
    view = memoryview(out.reshape(-1).view(np.uint8).data)
    at = 0
    while at < len(view):
        count = os.preadv(file.fileno(), [view[at:]], entry.offset + start + at)
        if count == 0:
            raise InputError(f"{entry.path} ended while tensor {entry.name!r} was read")
        at += count
