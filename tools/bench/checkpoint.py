"""The weights and token ids that every peer gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench.settings import ModelBench

CHECKPOINT, INPUTS = "checkpoint", "inputs.npz"


def write(folder: Path, bench: ModelBench) -> None:
    """Write `folder`/checkpoint, float32 and in one piece whatever it comes from, and the ids.

    Imports JAX: call it in a process of its own.
    """
    import numpy as np

    from model.hf import load_hf, save_hf

    if bench.checkpoint:
        policy = load_hf(Path(bench.checkpoint), param_dtype="float32")
        config, params = policy.config, policy.params
    else:
        config, params = bench.model, _random(bench)
    save_hf(folder / CHECKPOINT, params, config, dtype="float32")
    draw = np.random.default_rng(bench.seed)
    shapes = {"batch": (bench.rows, bench.tokens), "prompts": (bench.slots, bench.prompt)}
    ids = {
        # never 0, which some libraries cannot but take for padding
        name: draw.integers(1, config.vocab_size, shape, dtype=np.int32)
        for name, shape in shapes.items()
    }
    np.savez(folder / INPUTS, batch=ids["batch"], prompts=ids["prompts"])


def _random(bench: ModelBench) -> Any:
    """Weights with something at work everywhere: a part left out, or a scale forgotten, shows."""
    import jax
    import numpy as np

    from model.qwen3 import abstract

    draw = np.random.default_rng([bench.seed, 1])

    def one(path: tuple[Any, ...], spec: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if "norm" in name:
            return draw.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        fan_in = spec.shape[-1 if name == "embed" else -2]
        return (draw.normal(size=spec.shape) * fan_in**-0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract(bench.model))
