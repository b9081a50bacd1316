"""A policy as an Orbax folder: ``config.json``, ``params/``, and what travels with the weights.

What training checkpoints hold beside the weights is not in it (``model/checkpoint.py``). The
folder is written aside and renamed, and Orbax does the same with ``params/`` within it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import InputError
from model.assets import carried
from model.config import DTYPES, Qwen3Config
from model.hf import LoadedPolicy, read_config
from model.hosts import barrier, host_index
from model.qwen3 import Params, abstract

PARAMS, MARK = "params", "remend-orbax-1"


def save_orbax(
    folder: Path,
    params: Params,
    config: Qwen3Config,
    *,
    dtype: str | None = None,
    assets: Path | None = None,
) -> None:
    """Write a folder that ``load_orbax`` reads, on any mesh.

    Args:
        folder: created; replaced if it is an earlier one, refused if it holds anything else.
        dtype: "float32" or "bfloat16" to cast; None keeps each parameter's bits.
        assets: a folder whose tokenizer files, chat template and generation config are copied.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise InputError(f"{folder} exists and is not an earlier export; choose another folder")
    if dtype is not None:
        params = jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), params)
    aside = folder.parent / f".{folder.name}.writing"
    if host_index() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        hf = config.to_hf() | {"torch_dtype": np.dtype(params["embed"].dtype).name}
        files, token_ids = carried(assets)
        hf |= token_ids
        for name, data in files.items():
            (aside / name).write_bytes(data)
        (aside / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        (aside / MARK).touch()
    barrier(f"{folder} opened")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(aside / PARAMS, params)
    if host_index() == 0:
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    barrier(f"{folder} in place")


def load_orbax(
    folder: Path,
    *,
    param_dtype: str | None = None,
    shardings: Callable[[Qwen3Config], Params] | None = None,
    **run: Any,
) -> LoadedPolicy:
    """Read config and parameters, cast and laid out as asked; arguments as of ``load_hf``.

    Raises InputError naming the parameter that is missing, extra or misshapen before any is read.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    config = replace(read_config(folder, **run), lora=None)
    if param_dtype is not None and param_dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {param_dtype!r}")
    want = abstract(config)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = _by_name(checkpointer.metadata(folder / PARAMS).item_metadata)
        except Exception as error:  # orbax, tensorstore and json each raise their own
            raise InputError(f"{folder / PARAMS} cannot be read: {_reason(error)}") from error
        asked = _by_name(want)
        for name in sorted(set(asked) ^ set(stored)):
            kind = "is missing from" if name in asked else "is unexpected in"
            raise InputError(f"parameter {name} {kind} {folder / PARAMS}")
        for name, spec in asked.items():
            if tuple(stored[name].shape) != spec.shape:
                raise InputError(
                    f"{folder / PARAMS}: parameter {name} has shape {tuple(stored[name].shape)}, "
                    f"the config asks for {spec.shape}"
                )
        dtype = param_dtype or np.dtype(stored["embed"].dtype).name
        if dtype not in DTYPES:
            raise InputError(f"{folder / PARAMS}: parameters are {dtype}, not {', '.join(DTYPES)}")
        config = replace(config, param_dtype=dtype)
        place = shardings(config) if shardings else jax.tree.map(lambda _: _here(), want)
        like = jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(
                spec.shape, jnp.dtype(dtype), sharding=sharding
            ),
            want,
            place,
        )
        try:
            params = checkpointer.restore(folder / PARAMS, like)
        except Exception as error:
            raise InputError(f"{folder / PARAMS} cannot be read: {_reason(error)}") from error
    return LoadedPolicy(folder, config, params)


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
