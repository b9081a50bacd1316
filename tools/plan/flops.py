"""What a Qwen3 has to compute, by formula: what the model asks for, and what our program does.

Per token, counting a multiply-add as two and leaving norms, rotations and the softmax out:

    forward    2 N + 4 L H hd · (keys that a token sees, S/2 on average in a row of S tokens)
    backward   twice that

N holds every matrix that a token is multiplied with: projections, MLP (of a mixture the experts
that see it, and the router) and the head, also where it is the embedding. Looking a token up is no
product. Frozen matrices have no gradient of their own: half of their backward pass. See
https://arxiv.org/abs/2001.08361, appendix B, and for MFU https://arxiv.org/abs/2204.02311.

Our program does more: it computes again in the backward pass what it has not kept, attention works
in tiles that reach beyond the diagonal, and the head in chunks of the vocabulary that overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from model.attention import QUERY_BLOCK
from model.config import Qwen3Config
from model.logprobs import CHUNK, even_chunk
from model.splash import BLOCK as SPLASH_BLOCK
from model.splash import LANES


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs for one token of a program.

    matmul, attention: of the model; what MFU is measured by.
    done_matmul, done_attention: what the program does.
    """

    matmul: float
    attention: float
    done_matmul: float
    done_attention: float

    @property
    def model(self) -> float:
        return self.matmul + self.attention

    @property
    def done(self) -> float:
        return self.done_matmul + self.done_attention


def layer_parameters(config: Qwen3Config) -> int:
    """Scalars of one layer's matrices that a token is multiplied with, adapters not counted."""
    d, hd = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
    attention = 2 * d * (q + kv)
    if config.num_experts:
        mlp = config.num_experts_per_tok * 3 * d * config.moe_intermediate_size
        mlp += d * config.num_experts
    else:
        mlp = 3 * d * config.intermediate_size
    return attention + mlp


def adapter_parameters(config: Qwen3Config) -> int:
    """Scalars of one layer's adapters."""
    if not config.lora:
        return 0
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    ends = {"q": d + q, "k": d + kv, "v": d + kv, "o": q + d} | dict.fromkeys(
        ("gate", "up", "down"), d + f
    )
    return config.lora.rank * sum(ends[name] for name in config.lora.targets)


def matmul_parameters(config: Qwen3Config) -> int:
    """N: scalars of all matrices that a token is multiplied with, adapters not counted."""
    head = config.hidden_size * config.vocab_size
    return config.num_hidden_layers * layer_parameters(config) + head


def per_token(
    config: Qwen3Config,
    length: int,
    *,
    segment: float | None = None,
    targets: int = 0,
    mesh: Mapping[str, int] | None = None,
    training: bool = True,
) -> TokenFlops:
    """FLOPs for each token of rows of ``length`` tokens.

    Args:
        segment: mean length of what attends within itself, where rows are packed; None: the row.
            The program does not profit from it: its tiles are those of a whole row.
        targets: slots of a row whose logits are computed; 0: one for each token.
        mesh: devices by axis: of ``tensor`` depend the head's chunks, of ``context`` the tiles.
        training: the step; otherwise the log-probabilities alone.
    """
    mesh = mesh or {}
    layers, heads = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    layer, adapters = layer_parameters(config), adapter_parameters(config)
    head = config.hidden_size * config.vocab_size * (targets or length) / length
    vocabulary = config.vocab_size // mesh.get("tensor", 1)
    chunk = even_chunk(vocabulary, CHUNK)
    overlap = math.ceil(vocabulary / chunk) * chunk / vocabulary
    pair = 2.0 * layers * heads  # one product, for each pair of tokens
    seen, visited = (segment or length) / 2, _visited(config.attention, length, mesh)
    forward = 2.0 * (layers * (layer + adapters) + head)
    if not training:
        done = 2.0 * (layers * (layer + adapters) + overlap * head)
        return TokenFlops(forward, 2 * pair * seen, done, 2 * pair * visited)

    # forward, the gradient of what came in, and of what is trained
    times = 4.0 if config.lora else 6.0
    matmul = times * (layers * layer + head) + 6.0 * layers * adapters
    again = _matmuls_again(config)
    done = times * layers * layer + 6.0 * layers * adapters + 2.0 * layers * again
    # logits of several chunks are not kept; those of one the compiler does not make twice
    done += (times + 2.0 * (chunk < vocabulary)) * overlap * head
    products = 2 + _BACKWARD[config.attention]
    if config.remat in ("full", "offload", "dots"):
        products += 2
    return TokenFlops(matmul, 3 * 2 * pair * seen, done, products * pair * visited)


# Products that attention's backward pass does for each pair: scores, their gradient, dQ, dK, dV.
# Splash has a kernel for dQ and one for dK and dV, and each makes the first two for itself.
_BACKWARD = {"xla": 5, "context": 5, "cudnn": 5, "splash": 7}


def _matmuls_again(config: Qwen3Config) -> float:
    """Scalars of a layer's matrices whose product the backward pass makes again."""
    if config.remat == "none":
        return 0.0
    d, whole = config.hidden_size, layer_parameters(config) + adapter_parameters(config)
    if not config.num_experts:
        # no derivative needs the result of a layer's last product
        inner = config.intermediate_size * d
        return 0.0 if config.remat == "dots" else whole - inner
    # of a mixture that of the router's weights does
    experts = 3 * config.num_experts_per_tok * d * config.moe_intermediate_size
    return experts + d * config.num_experts if config.remat == "dots" else whole


def _visited(attention: str, length: int, mesh: Mapping[str, int]) -> float:
    """Keys whose scores are computed for a query, on average."""
    if attention == "context":  # of 2n chunks: two diagonals, and the pairs below them
        n = mesh.get("context", 1)
        return (2 * n + 1) * length / (4 * n)
    if attention == "cudnn":
        return length / 2
    padded = -(-length // LANES) * LANES if attention == "splash" else length
    block = math.gcd(padded, SPLASH_BLOCK) if attention == "splash" else QUERY_BLOCK
    ends = [min(start + block, padded) for start in range(0, padded, block)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) / length
