"""HBM of one device in a training step: what the compiler says, and a formula beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import Qwen3Config
from model.logprobs import CHUNK, even_chunk
from tools.plan.flops import adapter_parameters, layer_parameters

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. ``parts`` says what an estimate is made of; empty if it was measured."""

    arguments: float
    outputs: float
    aliased: float  # outputs that lie where donated arguments lay
    temporaries: float
    host: float  # in the host's memory, part of none of the others
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The most that is there at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def compiled_memory(compiled: Any) -> Memory:
    """What XLA has laid out for a program (``jax.stages.Compiled``)."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        host=sum(
            getattr(found, f"host_{what}_size_in_bytes") for what in ("argument", "output", "temp")
        )
        - found.host_alias_size_in_bytes,
        parts={},
    )


def estimate(
    config: Qwen3Config,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
    *,
    microbatches: int = 1,
    targets: int = 0,
    training: bool = True,
    moment_dtype: str = "",
    offload: bool = False,
) -> Memory:
    """HBM of one device in a step of AdamW, or in a computation of log-probabilities.

    With P parameters, w devices that share a matrix (fsdp · context · tensor), p = P / w,
    t = rows · length / context tokens and L layers:

        params        p · bytes of param_dtype; they are their own master copy
        moments       2 p · bytes of moment_dtype; none here where they are offloaded
        gradients     p · bytes of param_dtype, twice where microbatches are added up
                      (moments and gradients: of the adapters alone, if there are any)
        saved         L · (what remat keeps of a layer)
        layer         one layer at work in the backward pass: all that it has computed, and the
                      gradients of its widest part
        gathered      one layer's matrices, whole but for tensor, in the compute dtype
        logits        3 t · chunk in float32: logits, probabilities, their gradient

    At the fullest moment there are gradients, saved, and the larger of logits and layer + gathered.

    Args:
        mesh: devices by axis; ``slice`` and ``data`` split rows only.
        rows, length: of one microbatch on this device; length is the whole row's, over context.
        targets: slots of a row whose logits are computed; 0: one for each token.
        training: the step; otherwise parameters and one pass forward.
    """
    tensor, context = mesh.get("tensor", 1), mesh.get("context", 1)
    shared = mesh.get("fsdp", 1) * context * tensor
    mine = config.num_parameters / shared
    stored, wide = BYTES[config.param_dtype], BYTES[config.dtype]
    trained, precise = mine, stored
    if config.lora:
        trained, precise = config.num_hidden_layers * adapter_parameters(config) / shared, 4
        mine += trained
    if not training:
        trained = 0.0
    moments = 2 * trained * (BYTES[moment_dtype] if moment_dtype else precise)
    tokens = rows * length / context
    everything = _working_width(config, tensor, wide)
    inner = _inner(config) / tensor
    chunk = even_chunk(config.vocab_size // tensor, CHUNK)
    saved = _layer_width(config, config.remat, tensor, wide)
    widest = wide * (2 * inner + config.hidden_size)  # gradients of the MLP's parts
    parts = {
        "params": mine * stored,
        "moments": 0.0 if offload else moments,
        "gradients": trained * precise * (2 if microbatches > 1 else 1),
        "saved": config.num_hidden_layers * tokens * saved * training,
        "layer": tokens * (everything + widest if training else widest),
        "gathered": matrices(config) / tensor * wide if shared > tensor else 0.0,
        "logits": (3 if training else 1) * rows * (targets or length) / context * chunk * 4,
    }
    arguments = parts["params"] + parts["moments"]
    return Memory(
        arguments=arguments,
        outputs=arguments * training,
        aliased=arguments * training,  # the state is donated
        temporaries=parts["gradients"]
        + parts["saved"]
        + max(parts["logits"], parts["layer"] + parts["gathered"]),
        host=moments if offload else 0.0,
        parts=parts,
    )


def _layer_width(config: Qwen3Config, remat: str, tensor: int, wide: int) -> float:
    """Bytes that a layer keeps for its backward pass, for each token of the device's rows.

    Between the products tokens are split over ``tensor``, within them heads and hidden units are.
    """
    d, hd = config.hidden_size, config.head_dim
    q = config.num_attention_heads * hd / tensor
    kv = config.num_key_value_heads * hd / tensor
    inner = _inner(config) / tensor
    stream = d / tensor
    normalisers = 4 * config.num_attention_heads / tensor  # log-sum-exp, float32
    if remat == "offload":
        return 0.0
    if remat == "full":
        return stream * wide
    if remat == "attention":
        return (stream + q) * wide + normalisers
    if remat == "dots":
        # of Wo and of the last one the group's sum is kept, for own tokens
        return (3 * stream + q + 2 * kv + 2 * inner) * wide
    # Between forward and backward pass nothing is fused: what norms, rotations (of q and k) and
    # silu go through is kept as well, the first two in float32.
    within = 4 * (stream + q + kv) * 4 + 2 * inner * wide
    return _working_width(config, tensor, wide) + within


def _working_width(config: Qwen3Config, tensor: int, wide: int) -> float:
    """Bytes that a layer at work computes for each token, those aside that never leave the chip."""
    d, hd = config.hidden_size, config.head_dim
    q = config.num_attention_heads * hd / tensor
    kv = config.num_key_value_heads * hd / tensor
    inner = _inner(config) / tensor
    normalisers = 4 * config.num_attention_heads / tensor
    # the residual stream twice, both inputs of products, q and k before and after their norm and
    # turned, v, attention's result, and gate, up, silu(gate) and their product
    return (2 * d / tensor + 2 * d + 4 * q + 4 * kv + 4 * inner) * wide + normalisers


def _inner(config: Qwen3Config) -> int:
    """Hidden units that a token has in the MLP."""
    if config.num_experts:
        return config.num_experts_per_tok * config.moe_intermediate_size
    return config.intermediate_size


def matrices(config: Qwen3Config) -> float:
    """Scalars of one layer's matrices, of a mixture all experts."""
    if not config.num_experts:
        return layer_parameters(config)
    idle = config.num_experts - config.num_experts_per_tok
    return layer_parameters(config) + idle * 3 * config.hidden_size * config.moe_intermediate_size
