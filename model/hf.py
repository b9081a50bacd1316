"""Hugging Face folders: ``config.json``, safetensors under transformers' tensor names, tokenizer.

A folder is written aside, its ``manifest.json`` (sha256 and size of every file) last, and only then
moved into place, so that a half-written folder is never taken for a whole one. Reading checks the
manifest where there is one, and always every tensor's name, shape and dtype.

Safetensors is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then
raw little-endian data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import InputError
from model.config import DTYPES, Qwen3Config
from model.qwen3 import Params, abstract

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

MANIFEST, FORMAT = "manifest.json", "remend-hf-1"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Our name in ``params["layers"]`` -> transformers' name within a layer, and whether the matrix is
# stored transposed (torch keeps [out, in], we keep [in, out]).
_LAYER_TENSORS = {
    "attn_norm": ("input_layernorm", False),
    "q": ("self_attn.q_proj", True),
    "k": ("self_attn.k_proj", True),
    "v": ("self_attn.v_proj", True),
    "q_norm": ("self_attn.q_norm", False),
    "k_norm": ("self_attn.k_norm", False),
    "o": ("self_attn.o_proj", True),
    "mlp_norm": ("post_attention_layernorm", False),
    "gate": ("mlp.gate_proj", True),
    "up": ("mlp.up_proj", True),
    "down": ("mlp.down_proj", True),
}
_TOP_TENSORS = {
    "embed": ("model.embed_tokens.weight", False),
    "norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", True),
}
_SAFETENSORS_DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(jnp.bfloat16)}


def save_hf(
    folder: Path,
    params: Params,
    config: Qwen3Config,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers, SGLang and ``load_hf`` read.

    Args:
        folder: created; replaced if it is an earlier export, refused if it holds anything else.
        dtype: "float32" or "bfloat16" to cast; None keeps each parameter's bits.
        meta: JSON values kept in the manifest (weight version, step, ...).
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} exists and is not an earlier export; choose another folder")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    host: Params = jax.tree.map(np.asarray, params)
    if dtype is not None:
        host = jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), host)

    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        hf = config.to_hf() | {"torch_dtype": _dtype_name(host["embed"].dtype)}
        if tokenizer is not None:
            tokenizer.save(aside)
            end, pad = tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")
            hf["eos_token_id"] = end
            ids = {"eos_token_id": [end, pad], "pad_token_id": pad}
            (aside / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        (aside / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        _write_safetensors(aside / WEIGHTS, dict(_to_hf_names(host, config)))
        _write_manifest(aside, meta or {})
        _move_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def load_hf(folder: Path, *, param_dtype: str | None = None, **run: Any) -> LoadedPolicy:
    """Read config and parameters (jax arrays on the default device).

    Args:
        folder: a whole export of ours, or any folder with transformers' Qwen3 layout, sharded or
            not.
        param_dtype: "float32" or "bfloat16" to cast on reading; None keeps the stored bits.
        run: fields of our own for the config (``dtype`` to compute in, ``remat``, ...).

    Raises InputError naming the file or tensor that is missing, extra, truncated or misshapen.
    """
    folder = Path(folder)
    if param_dtype is not None:
        run["param_dtype"] = param_dtype
    config = Qwen3Config.from_hf(_read_json(folder / "config.json"), **run)
    check_manifest(folder)
    stored = _stored_tensors(folder)
    want = abstract(config)
    layers = {
        name: np.stack(
            [
                _take(stored, _layer_name(i, name), spec.shape[1:], _LAYER_TENSORS[name][1])
                for i in range(config.num_hidden_layers)
            ]
        )
        for name, spec in want["layers"].items()
    }
    host: Params = {
        name: _take(stored, _TOP_TENSORS[name][0], spec.shape, _TOP_TENSORS[name][1])
        for name, spec in want.items()
        if name != "layers"
    }
    host["layers"] = layers
    if config.tie_word_embeddings and "lm_head.weight" in stored:  # Qwen3-0.6B ships both
        copy = _take(stored, "lm_head.weight", want["embed"].shape, False)
        if copy.tobytes() != host["embed"].tobytes():
            raise InputError(
                f"{folder}: lm_head.weight differs from the embedding though the config ties them"
            )
    if stored:
        raise InputError(f"{folder}: unexpected tensor {sorted(stored)[0]!r} for this config.json")
    cast = jnp.dtype(param_dtype) if param_dtype else None
    return LoadedPolicy(folder, config, jax.tree.map(lambda a: jnp.asarray(a, cast), host))


def check_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, after comparing size and sha256 of every file it names; None if there is none.

    Raises InputError naming the first file that is missing or differs.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        return None  # another program's manifest
    for name, fact in manifest["files"].items():
        file = path.parent / name
        if not file.is_file():
            raise InputError(f"{file} is missing; the manifest lists it")
        if file.stat().st_size != fact["bytes"]:
            raise InputError(
                f"{file} has {file.stat().st_size} bytes, its manifest says {fact['bytes']}: "
                "truncated or overwritten"
            )
        if _sha256(file) != fact["sha256"]:
            raise InputError(f"{file} does not match the sha256 in its manifest: corrupt")
    return manifest


def _layer_name(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{_LAYER_TENSORS[name][0]}.weight"


def _to_hf_names(params: Params, config: Qwen3Config) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers' name, array in transformers' orientation), layer by layer."""
    want = abstract(config)
    for name, (hf_name, transposed) in _TOP_TENSORS.items():
        if name in want:
            _check_shape(name, params[name], want[name].shape)
            yield hf_name, params[name].T if transposed else params[name]
    for name, spec in want["layers"].items():
        _check_shape(name, params["layers"][name], spec.shape)
        for i, value in enumerate(params["layers"][name]):
            yield _layer_name(i, name), value.T if _LAYER_TENSORS[name][1] else value


def _check_shape(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise InputError(f"parameter {name} has shape {value.shape}, the config asks for {shape}")


def _take(
    stored: dict[str, np.ndarray], name: str, shape: tuple[int, ...], transposed: bool
) -> np.ndarray:
    """Remove a tensor from ``stored`` and return it in our orientation."""
    if name not in stored:
        raise InputError(f"tensor {name!r} is missing from the checkpoint")
    value = stored.pop(name)
    value = value.T if transposed else value
    if value.shape != shape:
        found, asked = (tuple(reversed(s)) if transposed else s for s in (value.shape, shape))
        raise InputError(f"tensor {name!r} has shape {found}, the config asks for {asked}")
    return value


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in tensors.items():
        kind = next(k for k, d in _SAFETENSORS_DTYPES.items() if d == value.dtype)
        ends = [offset, offset + value.nbytes]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": ends}
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).view(np.uint8).data)


def _stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder by name, memory-mapped."""
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        named = _read_json(folder / INDEX).get("weight_map", {}).values()
        files = sorted({Path(name).name for name in named})  # never outside the folder
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        tensors |= _read_safetensors(folder / name)
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= size - 8 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [
            (n, f["dtype"], tuple(f["shape"]), *f["data_offsets"]) for n, f in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is truncated or not a safetensors file ({size} bytes)") from None
    tensors: dict[str, np.ndarray] = {}
    for name, kind, shape, begin, end in entries:
        if kind not in _SAFETENSORS_DTYPES:
            raise InputError(f"{path}: tensor {name!r} has dtype {kind}, not F32 or BF16")
        dtype = _SAFETENSORS_DTYPES[kind]
        if begin < 0 or end - begin != dtype.itemsize * math.prod(shape):
            raise InputError(f"{path}: tensor {name!r} has {end - begin} bytes for shape {shape}")
        if 8 + length + end > size:
            raise InputError(f"{path} is truncated: tensor {name!r} ends after the file")
        raw = np.memmap(path, np.uint8, "r", 8 + length + begin, end - begin)
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def _write_manifest(folder: Path, meta: Mapping[str, Any]) -> None:
    """Flush every file of the folder to disk, then write their sizes and hashes."""
    files = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    with (folder / MANIFEST).open("w") as handle:
        json.dump({"format": FORMAT, "meta": dict(meta), "files": files}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def _move_into_place(aside: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def _dtype_name(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == _SAFETENSORS_DTYPES["BF16"] else "float32"
