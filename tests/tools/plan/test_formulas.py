"""FLOPs and memory by formula, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import Qwen3Config, preset
from tools.plan.flops import layer_parameters, matmul_parameters, per_token
from tools.plan.memory import GIB, estimate

SMALL = Qwen3Config(
    vocab_size=1000,
    hidden_size=10,
    intermediate_size=30,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
# q and o: 2 * 10 * 24, k and v: 2 * 10 * 12, MLP: 3 * 10 * 30
LAYER = 480 + 240 + 900


def test_matrices():
    assert layer_parameters(SMALL) == LAYER
    assert matmul_parameters(SMALL) == 2 * LAYER + 10 * 1000
    # every parameter but the norms and the looked-up embedding
    real = preset("qwen3-32b")
    norms = 64 * (2 * 5120 + 2 * 128) + 5120
    assert matmul_parameters(real) == real.num_parameters - norms - 151_936 * 5120


def test_a_tied_head_is_multiplied_with_all_the_same():
    assert matmul_parameters(replace(SMALL, tie_word_embeddings=True)) == matmul_parameters(SMALL)


def test_a_mixture_counts_the_experts_that_see_a_token():
    mixture = replace(SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=5)
    assert layer_parameters(mixture) == 480 + 240 + 2 * 3 * 10 * 5 + 10 * 8


def test_flops_of_a_token():
    found = per_token(SMALL, length=100)
    assert found.matmul == 6 * (2 * LAYER + 10_000)
    # 12 L H hd S/2
    assert found.attention == 12 * 2 * 4 * 6 * 50
    # the head's logits, and the scores of attention: half of a forward pass of it
    assert found.recomputed == 2 * 10_000 + 0.5 * 4 * 2 * 4 * 6 * 50
    assert per_token(SMALL, length=100, segment=20).attention == 12 * 2 * 4 * 6 * 10


@pytest.mark.parametrize(
    ("remat", "matmuls", "attentions"), [("dots", 0, 1), ("full", LAYER - 300, 1)]
)
def test_what_is_computed_again(remat, matmuls, attentions):
    plain = per_token(SMALL, length=100)
    found = per_token(replace(SMALL, remat=remat), length=100)
    forward = 4 * 2 * 4 * 6 * 50
    assert found.recomputed - plain.recomputed == 2 * 2 * matmuls + attentions * forward
    assert found.model == plain.model


def test_6n_of_a_real_model():
    """The rule of thumb: 6 N, attention a few per cent at 4,096 tokens."""
    found = per_token(preset("qwen3-32b"), length=4096)
    assert found.matmul == pytest.approx(6 * 32.0e9, rel=0.01)
    assert found.attention == 12 * 64 * 64 * 128 * 2048


def test_memory_of_a_step():
    """Qwen3-32B in float32 with AdamW over 64 chips: 12 bytes a parameter of state."""
    config = preset("qwen3-32b", param_dtype="float32", remat="full", attention="splash")
    found = estimate(config, {"fsdp": 16, "tensor": 4}, rows=1, length=4096)
    assert found.arguments == 12 * config.num_parameters / 64
    assert found.arguments / GIB == pytest.approx(5.72, abs=0.03)  # the compiler says 5.73
    assert found.parts["gradients"] == 4 * config.num_parameters / 64
    assert found.parts["saved"] == 64 * 4096 * (5120 / 4) * 2
    assert found.parts["gathered"] == layer_parameters(config) / 4 * 2
    assert found.parts["logits"] == 3 * 4096 * 8192 * 4
    parts = found.parts
    assert parts["logits"] < parts["layer"] + parts["gathered"]
    assert found.temporaries == pytest.approx(
        sum(parts.values()) - found.arguments - parts["logits"]
    )
    assert found.total == found.arguments + found.temporaries


def test_what_changes_memory():
    config = preset("qwen3-32b", param_dtype="float32", remat="full", attention="splash")
    mesh = {"data": 2, "fsdp": 16, "context": 2, "tensor": 4}
    base = estimate(config, mesh, rows=1, length=8192)
    many = estimate(config, mesh, rows=1, length=8192, microbatches=4)
    assert many.parts["gradients"] == 2 * base.parts["gradients"]
    away = estimate(config, mesh, rows=1, length=8192, offload=True)
    assert (away.parts["moments"], away.host) == (0, base.parts["moments"])
    small = estimate(config, mesh, rows=1, length=8192, moment_dtype="bfloat16")
    assert small.parts["moments"] == base.parts["moments"] / 2
    widths = [
        estimate(replace(config, remat=remat), mesh, 1, 8192).parts["saved"]
        for remat in ("full", "dots", "none")
    ]
    assert widths == sorted(widths)
