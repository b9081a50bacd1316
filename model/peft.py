"""Adapters in the PEFT format, to be loaded onto the base model they were trained on.

``adapter_config.json`` and ``adapter_model.safetensors`` as huggingface/peft reads them: A is
stored [rank, in] and B [out, rank] (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import InputError
from model.blocks import blocks
from model.config import Qwen3Config
from model.hf_names import layer_tensor
from model.hosts import barrier, host_index
from model.qwen3 import Params
from model.tensorfile import write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(folder: Path, params: Params, config: Qwen3Config, base: str) -> None:
    """Write the adapters of ``params``; of several hosts, which gather them together, the first.

    Args:
        folder: created; replaced if it holds adapters, refused if it holds anything else.
        base: path or hub name of the model that the adapters belong to.
    """
    lora = config.lora
    if lora is None:
        raise InputError("there are no adapters to export: the config has no lora")
    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise InputError(f"{folder} exists and holds no adapters; choose another folder")
    stored: dict[str, np.ndarray] = {}
    for layer in range(config.num_hidden_layers):
        for name in lora.targets:
            stem = f"base_model.model.model.layers.{layer}.{layer_tensor(name)}.lora_"
            for side in "ab":
                parts = list(blocks(params["layers"][f"{name}_lora_{side}"], (layer,), 0))
                stored[f"{stem}{side.upper()}.weight"] = np.concatenate(parts)
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [layer_tensor(name).rpartition(".")[2] for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    if host_index() == 0:
        _write(folder, stored, facts)
    barrier(f"{folder} written")


def _write(folder: Path, stored: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    aside = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        header = [(name, value.dtype, value.shape[::-1]) for name, value in stored.items()]
        write(aside / WEIGHTS, header, lambda name: [(stored[name], True)])
        (aside / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
