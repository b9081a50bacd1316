"""What a training step of a Qwen3 has to compute, by formula.

Per token, counting a multiply-add as two and leaving norms, rotations and the softmax out:

    forward    2 N + 4 L H hd · (keys that a token sees, S/2 on average in a row of S tokens)
    backward   twice that

N holds every matrix that a token is multiplied with: projections, MLP (of a mixture the experts
that see it, and the router) and the head, also where it is the embedding. Looking a token up is no
product. See https://arxiv.org/abs/2001.08361, appendix B, and for MFU
https://arxiv.org/abs/2204.02311.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import Qwen3Config


@dataclass(frozen=True)
class StepFlops:
    """FLOPs for one token of a training step."""

    matmul: float
    attention: float
    recomputed: float  # by the backward pass, on top: no part of the model's FLOPs

    @property
    def model(self) -> float:
        """What MFU is measured by."""
        return self.matmul + self.attention

    @property
    def executed(self) -> float:
        """What the device does."""
        return self.model + self.recomputed


def layer_parameters(config: Qwen3Config) -> int:
    """Scalars of one layer's matrices that a token is multiplied with."""
    d, hd = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
    attention = 2 * d * (q + kv)
    if config.num_experts:
        mlp = config.num_experts_per_tok * 3 * d * config.moe_intermediate_size
        mlp += d * config.num_experts
    else:
        mlp = 3 * d * config.intermediate_size
    return attention + mlp


def matmul_parameters(config: Qwen3Config) -> int:
    """N: scalars of all matrices that a token is multiplied with."""
    head = config.hidden_size * config.vocab_size
    return config.num_hidden_layers * layer_parameters(config) + head


def per_token(config: Qwen3Config, length: int, segment: float | None = None) -> StepFlops:
    """FLOPs of a training step for each token of rows of ``length`` tokens.

    ``segment`` is the mean length of what attends within itself, where rows are packed; None: the
    row. Attention counts the pairs of tokens that see each other, not the tiles that a kernel
    visits: these are more by one tile's width a row.

    ``recomputed`` is what the backward pass makes again: the logits of the head
    (``model/logprobs.py``), the scores of attention, and of every layer what ``config.remat`` has
    not kept. The last product of a layer is never made again: no derivative needs its result.
    """
    d, hd, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
    forward = 2.0 * matmul_parameters(config)
    attention = 4.0 * layers * config.num_attention_heads * hd * (segment or length) / 2

    inner = config.intermediate_size
    if config.num_experts:
        inner = config.num_experts_per_tok * config.moe_intermediate_size
    all_but_last = layer_parameters(config) - inner * d
    again = {
        "none": 0.0,
        "dots": attention,
        "attention": 2.0 * layers * all_but_last,
        "full": 2.0 * layers * all_but_last + attention,
        "offload": 2.0 * layers * all_but_last + attention,
    }[config.remat]
    again += _SCORES[config.attention] * attention + 2.0 * d * config.vocab_size
    return StepFlops(3 * forward, 3 * attention, again)


# Scores made again by the backward pass, in forward passes of attention (two products each). Splash
# has a kernel for dQ and one for dK and dV; both make S, and each makes dP for itself.
_SCORES = {"xla": 0.5, "context": 0.5, "cudnn": 0.5, "splash": 1.5}
