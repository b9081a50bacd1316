"""Hugging Face folders: ``config.json``, safetensors under transformers' tensor names, tokenizer.

Reading checks the manifest of an export (``model/export_folder.py``) and always every tensor's
name, shape and dtype, before any parameter is allocated.

Both directions go tensor by tensor: beside the parameters themselves, reading holds a few MiB for
each thread (a layer's part where they go to an accelerator), writing one tensor, or of one that is
split over devices a block of rows.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import InputError
from model.assets import carried
from model.blocks import blocks
from model.config import DTYPES, Qwen3Config
from model.export_folder import ExportFolder, check_manifest, read_json
from model.fill import Filler
from model.hf_names import Tensor, rows_axis, tensors
from model.hosts import barrier, host_count, host_index
from model.qwen3 import Params, abstract
from model.tensorfile import Entry, entries, write

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000  # of one file: several are hashed and read at a time

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]


def save_hf(
    folder: Path,
    params: Params,
    config: Qwen3Config,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str | None = None,
    meta: Mapping[str, Any] | None = None,
    assets: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    resume: str | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a folder that transformers, SGLang and ``load_hf`` read.

    Args:
        folder: created; replaced if it is an earlier export, refused if it holds anything else.
            A URL (``gs://…``) is written through ``etils.epath``.
        params: arrays, or anything that indexes and converts to numpy like them; may be sharded
            over hosts, each of which then writes its share of the files.
        dtype: "float32" or "bfloat16" to cast; None keeps each parameter's bits.
        meta: JSON values kept in the manifest (weight version, step, ...).
        assets: a folder whose tokenizer files, chat template and generation config are copied.
        shard_bytes: size at which a new file is begun; below it there is one file and no index.
        resume: names what is written. A write of the same name that was cut off is taken up where
            it stopped; None begins anew.
    """
    files = _files(params, config, dtype, shard_bytes)
    plan = [one for inside in files.values() for one in inside]
    target = ExportFolder(folder, resume and f"{resume} {dtype} {shard_bytes}")
    total = sum(_nbytes(t, d) for t, d in plan)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    with target:
        for number, (name, inside) in enumerate(files.items()):
            if target.has(name):
                advance(sum(_nbytes(t, d) for t, d in inside))
            else:  # every host takes part in gathering what is sharded
                _write_shard(target, name, inside, params, advance, write_it=_is_mine(number))
        barrier(f"{folder} weights")
        if host_index() == 0:
            hf = config.to_hf() | {"torch_dtype": _dtype_name(plan[0][1])}
            _write_rest(target, hf, files, tokenizer, assets, total)
            target.finish(meta or {})
        barrier(f"{folder} manifest")


def fetched(
    params: Params,
    config: Qwen3Config,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Params:
    """A copy in the host's memory that ``save_hf`` with the same arguments writes without any
    device, and that later changes of ``params`` do not reach. All hosts fetch together; each gets
    the values of those files alone that it writes: the rest is not set, and takes no memory.
    """
    held: dict[tuple[str, ...], np.ndarray] = {}
    for number, inside in enumerate(_files(params, config, dtype, shard_bytes).values()):
        for tensor, kept in inside:
            leaf, axis, end = _at(params, tensor.path), rows_axis(tensor), 0
            if tensor.path not in held:
                held[tensor.path] = _untouched(leaf.shape, kept)
            into = np.moveaxis(held[tensor.path][tensor.at], axis, 0)
            for block in blocks(leaf, tensor.at, axis, fetch=_is_mine(number)):
                rows = np.moveaxis(block, axis, 0)
                into[end : end + len(rows)] = rows
                end += len(rows)
    copy: dict[str, Any] = {"layers": {}}
    for path, values in held.items():
        _at(copy, path[:-1])[path[-1]] = values
    return copy


@dataclass(frozen=True)
class LoadedPolicy:
    """What a folder holds. ``tokenizer`` is read when first asked for."""

    folder: Path
    config: Qwen3Config
    params: Params

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError if the folder has none."""
        from model.tokenizer import Tokenizer

        return Tokenizer.load(self.folder)


def load_hf(
    folder: Path,
    *,
    param_dtype: str | None = None,
    shardings: Callable[[Qwen3Config], Params] | None = None,
    progress: Progress = lambda done, total: None,
    **run: Any,
) -> LoadedPolicy:
    """Read config and parameters.

    Args:
        folder: a whole export of ours, or any folder with transformers' Qwen3 layout, sharded or
            not.
        param_dtype: "float32" or "bfloat16" to cast on reading; None keeps the stored bits.
        shardings: gives the tree of shardings for a config; each host then reads what its own
            devices hold. None: the default device.
        run: fields of our own for the config (``dtype`` to compute in, ``remat``, ...).

    Raises InputError naming the file or tensor that is missing, extra, truncated, misshapen or of
    another dtype than the rest.
    """
    folder = Path(folder)
    config = read_config(folder, **run)
    check_manifest(folder)
    plan = checked_tensors(folder, config)
    stored = plan[0][1].dtype
    config = replace(config, param_dtype=param_dtype or _dtype_name(stored))
    total = sum(entry.nbytes for _, entry in plan)
    filler = Filler(jnp.dtype(config.param_dtype), lambda done: progress(done, total))
    leaves: dict[tuple[str, ...], list[tuple[Tensor, Entry]]] = {}
    for tensor, entry in plan:
        leaves.setdefault(tensor.path, []).append((tensor, entry))
    want, layout = abstract(replace(config, lora=None)), None
    if shardings is not None:
        layout = shardings(replace(config, lora=None))

    def start(*path: str) -> Callable[[], jax.Array]:
        spec: Any = _at(want, path)
        return filler.start(spec.shape, leaves[path], _at(layout, path) if layout else None)

    with filler:
        # all begun before any is awaited: memory is laid out while the threads read
        begun = {name: start(name) for name in want if name != "layers"}
        layers = {name: start("layers", name) for name in want["layers"]}
        params: Params = {name: finish() for name, finish in begun.items()}
        params["layers"] = {name: finish() for name, finish in layers.items()}
    return LoadedPolicy(folder, config, params)


def read_config(folder: Path, **run: Any) -> Qwen3Config:
    """The config of a folder; ``run`` sets our own fields."""
    return Qwen3Config.from_hf(read_json(Path(folder) / "config.json"), **run)


def checked_tensors(folder: Path, config: Qwen3Config) -> list[tuple[Tensor, Entry]]:
    """Where each tensor of the config lies in the folder's files, from their headers alone.

    Raises InputError as ``load_hf`` does.
    """
    stored = _stored_tensors(Path(folder))
    plan = []
    for tensor in tensors(config):
        entry = stored.pop(tensor.name, None)
        if entry is None:
            raise InputError(f"{folder}: tensor {tensor.name!r} is missing from the checkpoint")
        _check_shape(entry, tensor.shape)
        plan.append((tensor, entry))
    head = stored.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None:  # Qwen3-0.6B ships both
        embed = plan[0][1]
        _check_shape(head, embed.shape)
        if head.dtype != embed.dtype or not _same_bytes(head, embed):
            raise InputError(
                f"{folder}: lm_head.weight differs from the embedding though the config ties them"
            )
    if stored:
        raise InputError(f"{folder}: unexpected tensor {sorted(stored)[0]!r} for this config.json")
    dtypes = [entry.dtype for _, entry in plan]
    usual = max(set(dtypes), key=dtypes.count)
    for _, entry in plan:
        if entry.dtype != usual:
            raise InputError(
                f"{entry.path}: tensor {entry.name!r} is {_dtype_name(entry.dtype)}, the others "
                f"are {_dtype_name(usual)}"
            )
    return plan


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda branch, key: branch[key], path, tree)


# ---- reading


def _stored_tensors(folder: Path) -> dict[str, Entry]:
    """The entries of all tensors of a folder by name."""
    if not (folder / INDEX).is_file():
        return entries(folder / WEIGHTS)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise InputError(
                f"{folder / INDEX} puts tensor {tensor!r} into {name!r}: not a file of this folder"
            )
    found: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        for tensor, entry in entries(folder / name).items():
            if weight_map.get(tensor) != name:
                raise InputError(f"{folder / name}: unexpected tensor {tensor!r}, not in {INDEX}")
            found[tensor] = entry
    missing = sorted(set(weight_map) - set(found))
    if missing:
        name = weight_map[missing[0]]
        raise InputError(f"{folder / name}: tensor {missing[0]!r} is missing though {INDEX} has it")
    return found


def _check_shape(entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise InputError(
            f"{entry.path}: tensor {entry.name!r} has shape {entry.shape}, the config asks for "
            f"{shape}"
        )


def _same_bytes(a: Entry, b: Entry, step: int = 4 << 20) -> bool:
    with a.path.open("rb") as x, b.path.open("rb") as y:
        x.seek(a.offset)
        y.seek(b.offset)
        for start in range(0, a.nbytes, step):
            count = min(step, a.nbytes - start)
            if x.read(count) != y.read(count):
                return False
    return True


# ---- writing


def _files(
    params: Params, config: Qwen3Config, dtype: str | None, shard_bytes: int
) -> dict[str, list[tuple[Tensor, np.dtype]]]:
    """What goes into which file. Raises InputError for parameters that are not of this config, and
    for a dtype that is none of ours."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_shapes(params, config)
    return _cut([(t, _stored_dtype(params, t, dtype)) for t in tensors(config)], shard_bytes)


def _untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of pages that are there once they are written to. Not from malloc, which may have
    been told to keep what was freed (``model/host.py``), and gives pages that are there already."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def _is_mine(file: int) -> bool:
    """Whether this host writes the file of this number."""
    return file % host_count() == host_index()


def _stored_dtype(params: Params, tensor: Tensor, dtype: str | None) -> np.dtype:
    leaf = _at(params, tensor.path)
    return jnp.dtype(dtype) if dtype else np.dtype(leaf.dtype)


def _check_shapes(params: Params, config: Qwen3Config) -> None:
    want = abstract(replace(config, lora=None))
    flat = {**want.pop("layers"), **want}
    have = {**params["layers"], **{k: v for k, v in params.items() if k != "layers"}}
    for name in sorted(set(flat) ^ set(have)):
        raise InputError(
            f"parameter {name} is {'missing' if name in flat else 'not one of this config'}; "
            "merge adapters before an export"
        )
    for name, spec in flat.items():
        if have[name].shape != spec.shape:
            raise InputError(
                f"parameter {name} has shape {have[name].shape}, the config asks for {spec.shape}"
            )


def _nbytes(tensor: Tensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _cut(
    plan: list[tuple[Tensor, np.dtype]], limit: int
) -> dict[str, list[tuple[Tensor, np.dtype]]]:
    """Files by name, each of at most ``limit`` bytes or one tensor."""
    files: list[list[tuple[Tensor, np.dtype]]] = [[]]
    size = 0
    for tensor, dtype in plan:
        count = _nbytes(tensor, dtype)
        if files[-1] and size + count > limit:
            files.append([])
            size = 0
        files[-1].append((tensor, dtype))
        size += count
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {
        f"{stem}-{i:05d}-of-{len(files):05d}.safetensors": inside
        for i, inside in enumerate(files, start=1)
    }


def _write_shard(
    target: ExportFolder,
    name: str,
    inside: list[tuple[Tensor, np.dtype]],
    params: Params,
    advance: Callable[[int], None],
    *,
    write_it: bool,
) -> None:
    by_name = {tensor.name: (tensor, dtype) for tensor, dtype in inside}

    def fetch(stored: str) -> Iterator[tuple[np.ndarray, bool]]:
        tensor, dtype = by_name[stored]
        leaf = _at(params, tensor.path)
        for value in blocks(leaf, tensor.at, rows_axis(tensor), fetch=write_it):
            yield value if value.dtype == dtype else value.astype(dtype), tensor.transposed

    if not write_it:
        for tensor, _ in inside:
            list(fetch(tensor.name))
        return
    header = [(tensor.name, dtype, tensor.shape) for tensor, dtype in inside]
    target.put(name, lambda path: write(path, header, fetch, advance))


def _write_rest(
    target: ExportFolder,
    hf: dict[str, Any],
    files: Mapping[str, list[tuple[Tensor, np.dtype]]],
    tokenizer: Tokenizer | None,
    assets: Path | None,
    total: int,
) -> None:
    """Everything of a folder that is not weights."""
    if len(files) > 1:
        weight_map = {t.name: name for name, inside in files.items() for t, _ in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        target.put_text(INDEX, json.dumps(index, indent=2) + "\n")
    if tokenizer is not None:
        target.put_folder(tokenizer.save)
        end, pad = tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")
        hf["eos_token_id"] = end
        ids = {"eos_token_id": [end, pad], "pad_token_id": pad}
        target.put_text("generation_config.json", json.dumps(ids, indent=2) + "\n")
    extra, token_ids = carried(assets)
    hf |= token_ids
    for name, data in extra.items():
        target.put_text(name, data)
    target.put_text("config.json", json.dumps(hf, indent=2) + "\n")


def _dtype_name(dtype: np.dtype) -> str:
    return np.dtype(dtype).name
