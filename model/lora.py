"""Low-rank adapters (https://arxiv.org/abs/2106.09685): W + scale · A B; only A and B are trained.

Adapters are parameters like any other, called ``<matrix>_lora_a`` and ``<matrix>_lora_b``, so that
checkpoints, shardings and the optimizer treat them alike. The network adds their product to that
of the frozen matrix (``model/qwen3.py``); ``merged`` folds them in for serving and for export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from configs.errors import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Lora:
    """``rank`` of the adapters, ``alpha`` (scale = alpha / rank), and which matrices get one."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora: rank must be positive, got {self.rank}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise InputError(
                f"lora: targets must name some of {', '.join(TARGETS)}, got {list(self.targets)}"
            )

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied with."""
        return self.alpha / self.rank


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith(("_lora_a", "_lora_b"))


def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) parameters: the adapters, with a critic's head, and the rest; without
    adapters all are trained."""
    layers = params["layers"]
    adapters = {name: value for name, value in layers.items() if is_adapter(name)}
    if not adapters:
        return params, {}
    rest = {name: value for name, value in layers.items() if name not in adapters}
    head = {"value": params["value"]} if "value" in params else {}
    frozen = {name: value for name, value in params.items() if name not in head}
    return {"layers": adapters, **head}, frozen | {"layers": rest}


def join(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``split``."""
    if not frozen:
        return trained
    return frozen | trained | {"layers": frozen["layers"] | trained["layers"]}


def add_adapters(params: dict[str, Any], lora: Lora | None, seed: int) -> dict[str, Any]:
    """``params`` with fresh float32 adapters: A drawn from N(0, 1/in), B zero, so no change yet."""
    if lora is None:
        return params
    layers = dict(params["layers"])
    keys = jax.random.split(jax.random.key(seed), len(lora.targets))
    for name, key in zip(lora.targets, keys, strict=True):
        count, rows, columns = layers[name].shape
        a = jax.random.normal(key, (count, rows, lora.rank), jnp.float32) * rows**-0.5
        layers[f"{name}_lora_a"] = a
        layers[f"{name}_lora_b"] = jnp.zeros((count, lora.rank, columns), jnp.float32)
    return params | {"layers": layers}


@jax.jit
def _fold(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    product = jnp.einsum("lir,lro->lio", a.astype(jnp.float32), b.astype(jnp.float32))
    return (w.astype(jnp.float32) + scale * product).astype(w.dtype)


def merged(params: dict[str, Any], lora: Lora | None) -> dict[str, Any]:
    """Parameters without adapters that compute the same: W + scale · A B, rounded to W's dtype."""
    if lora is None:
        return params
    layers = {name: w for name, w in params["layers"].items() if not is_adapter(name)}
    for name in lora.targets:
        a, b = (params["layers"][f"{name}_lora_{side}"] for side in "ab")
        layers[name] = _fold(layers[name], a, b, jnp.float32(lora.scale))
    return params | {"layers": layers}
