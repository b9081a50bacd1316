"""Our parameters' places under the names of transformers' Qwen3 and Qwen3-MoE: the one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from model.config import Qwen3Config
from model.qwen3 import abstract

# Name in ``params["layers"]`` -> name within a layer, and whether the matrix is stored transposed
# (torch keeps [out, in], we keep [in, out]). {e} is the expert.
_LAYER = {
    "attn_norm": ("input_layernorm.weight", False),
    "q": ("self_attn.q_proj.weight", True),
    "k": ("self_attn.k_proj.weight", True),
    "v": ("self_attn.v_proj.weight", True),
    "q_bias": ("self_attn.q_proj.bias", False),
    "k_bias": ("self_attn.k_proj.bias", False),
    "v_bias": ("self_attn.v_proj.bias", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
    "o": ("self_attn.o_proj.weight", True),
    "o_bias": ("self_attn.o_proj.bias", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "router": ("mlp.gate.weight", True),
    "gate": ("mlp.gate_proj.weight", True),
    "up": ("mlp.up_proj.weight", True),
    "down": ("mlp.down_proj.weight", True),
}
_EXPERTS = {name: f"mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")}
_TOP = {
    "embed": ("model.embed_tokens.weight", False),
    "norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", True),
}


class Tensor(NamedTuple):
    """One stored tensor and where it lives in our parameters.

    It is ``params[path[0]]…[at]``, transposed where ``transposed``; ``shape`` is the stored one.
    """

    name: str
    path: tuple[str, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool


def tensors(config: Qwen3Config) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this config, in the order of the network."""
    tree = abstract(replace(config, lora=None))

    def top(name: str) -> Iterator[Tensor]:
        if name in tree:
            stored, transposed = _TOP[name]
            shape = tree[name].shape
            yield Tensor(stored, (name,), (), shape[::-1] if transposed else shape, transposed)

    yield from top("embed")
    for layer in range(config.num_hidden_layers):
        for name, (stored, transposed) in _LAYER.items():
            if name not in tree["layers"]:
                continue
            shape = tree["layers"][name].shape[1:]
            experts = config.num_experts if config.num_experts and name in _EXPERTS else 0
            for e in range(experts):
                part = _EXPERTS[name].format(e=e)
                yield _in_layer(layer, part, name, (layer, e), shape[1:], transposed)
            if not experts:
                yield _in_layer(layer, stored, name, (layer,), shape, transposed)
    yield from top("norm")
    yield from top("lm_head")


def rows_axis(tensor: Tensor) -> int:
    """The axis of the stored tensor's rows in ours."""
    return len(tensor.shape) - 1 if tensor.transposed else 0


def layer_tensor(name: str) -> str:
    """transformers' name within a layer of our dense matrix ``name``, without its ``.weight``."""
    return _LAYER[name][0].removesuffix(".weight")


def _in_layer(
    layer: int,
    stored: str,
    name: str,
    at: tuple[int, ...],
    shape: tuple[int, ...],
    transposed: bool,
) -> Tensor:
    shape = shape[::-1] if transposed else shape
    return Tensor(f"model.layers.{layer}.{stored}", ("layers", name), at, shape, transposed)
