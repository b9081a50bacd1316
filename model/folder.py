"""A policy's weights as a folder, whichever of the formats it is in: the one way to open one.

Hugging Face   config.json, *.safetensors, tokenizer           model/hf.py
Orbax          config.json, params/ (Orbax), tokenizer         model/orbax_folder.py
MaxText        items/ (Orbax, MaxText's own tree), config      model/maxtext.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import InputError
from model.config import Qwen3Config
from model.hf import INDEX, WEIGHTS, LoadedPolicy, Progress, load_hf
from model.orbax_folder import PARAMS, load_orbax
from model.qwen3 import Params

HF, ORBAX, MAXTEXT = "hf", "orbax", "maxtext"
FORMATS = (HF, ORBAX, MAXTEXT)


def format_of(folder: Path) -> str:
    """One of FORMATS; InputError if the folder is none of them."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return HF
    if (folder / PARAMS).is_dir():
        return ORBAX
    if (folder / "items").is_dir():
        return MAXTEXT
    other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if other:
        raise InputError(f"{folder / other[0]}: pickled weights are not read, only safetensors")
    raise InputError(
        f"{folder} holds no checkpoint: neither {WEIGHTS} (Hugging Face), nor {PARAMS}/ (Orbax), "
        "nor items/ (MaxText)"
    )


def load_policy(
    folder: Path,
    *,
    param_dtype: str | None = None,
    shardings: Callable[[Qwen3Config], Params] | None = None,
    progress: Progress = lambda done, total: None,
    **run: Any,
) -> LoadedPolicy:
    """Config and parameters of a folder in any of the formats; arguments as of ``load_hf``."""
    folder = Path(folder)
    kind = format_of(folder)
    if kind == HF:
        return load_hf(
            folder, param_dtype=param_dtype, shardings=shardings, progress=progress, **run
        )
    if kind == ORBAX:
        return load_orbax(folder, param_dtype=param_dtype, shardings=shardings, **run)
    from model.maxtext import load_maxtext

    config, params = load_maxtext(folder, param_dtype=param_dtype, shardings=shardings, **run)
    return LoadedPolicy(folder, config, params)
