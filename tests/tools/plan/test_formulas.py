"""FLOPs and memory by formula, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import Qwen3Config, preset
from model.lora import Lora
from tools.plan.flops import (
    adapter_parameters,
    layer_parameters,
    matmul_parameters,
    per_token,
)
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


FORWARD = 4 * 2 * 4 * 6  # of attention, for each pair of tokens


def test_flops_of_a_token():
    found = per_token(SMALL, length=512)
    assert found.matmul == 6 * (2 * LAYER + 10_000)
    assert found.attention == 3 * FORWARD * 256
    assert found.done_matmul == found.matmul
    # two blocks of 256 queries see 256 and 512 keys; five products in the backward pass
    assert found.done_attention == FORWARD * (1 + 2.5) * (256 + 512) / 2
    packed = per_token(SMALL, length=512, segment=20)
    assert packed.attention == 3 * FORWARD * 10
    assert packed.done == found.done


def test_log_probabilities_alone():
    found = per_token(SMALL, length=512, training=False)
    assert found.matmul == found.done_matmul == 2 * (2 * LAYER + 10_000)
    assert (found.attention, found.done_attention) == (FORWARD * 256, FORWARD * 384)


def test_logits_where_there_are_targets():
    some, all_of_them = (per_token(SMALL, length=512, targets=n) for n in (128, 0))
    assert all_of_them.matmul - some.matmul == 6 * 10_000 * 3 / 4


@pytest.mark.parametrize(
    ("remat", "matmuls", "attentions"),
    [("none", 0, 0), ("dots", 0, 1), ("attention", LAYER - 300, 0), ("full", LAYER - 300, 1)],
)
def test_what_is_computed_again(remat, matmuls, attentions):
    plain = per_token(SMALL, length=512)
    found = per_token(replace(SMALL, remat=remat), length=512)
    assert found.done_matmul - plain.done_matmul == 2 * 2 * matmuls
    assert found.done_attention - plain.done_attention == attentions * FORWARD * 384
    assert found.model == plain.model


def test_of_a_mixture_the_last_product_is_made_again():
    """The router's gradient needs what the experts gave."""
    mixture = replace(SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=5)
    plain = per_token(mixture, length=512)
    experts = 2 * 3 * 10 * 5
    for remat, again in (("full", layer_parameters(mixture)), ("dots", experts + 10 * 8)):
        found = per_token(replace(mixture, remat=remat), length=512)
        assert found.done_matmul - plain.done_matmul == 2 * 2 * again


def test_adapters():
    """Frozen matrices have no gradient of their own."""
    config = replace(SMALL, lora=Lora(rank=3, targets=("q", "down")))
    found = per_token(config, length=512)
    assert adapter_parameters(config) == 3 * (10 + 24) + 3 * (30 + 10)
    assert found.matmul == 4 * (2 * LAYER + 10_000) + 6 * 2 * adapter_parameters(config)


@pytest.mark.parametrize(
    ("attention", "context", "visited"),
    [
        ("splash", 1, 512 * 136 / 16),  # 136 of 256 tiles
        ("xla", 1, 256 * 33 / 2),
        ("context", 4, 9 * 8192 / 16),  # of 64 pairs of chunks a device does nine
        ("cudnn", 1, 4096),
    ],
)
def test_tiles_beyond_the_diagonal(attention, context, visited):
    config = replace(SMALL, attention=attention)
    found = per_token(config, length=8192, mesh={"context": context}, training=False)
    assert found.done_attention == FORWARD * visited


def test_chunks_of_the_vocabulary():
    """Cut evenly, into whole registers: 5 times 7,680 of 37,984."""
    config = preset("qwen3-32b")
    found = per_token(config, length=4096, mesh={"tensor": 4}, training=False)
    more = 2 * 5120 * 4 * (5 * 7680 - 37_984)
    assert found.done_matmul - found.matmul == pytest.approx(more)
    # and their logits are made again
    step = per_token(config, length=4096, mesh={"tensor": 4})
    assert step.done_matmul - step.matmul == pytest.approx(4 * more + 2 * 5120 * 151_936)


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
    assert found.parts["logits"] == 3 * 4096 * 7680 * 4
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


def test_memory_without_training():
    """Parameters, one layer at work, and logits of one pass; nothing is kept."""
    config = preset("qwen3-32b", attention="splash")
    found = estimate(config, {"fsdp": 16, "tensor": 4}, 1, 8192, training=False)
    assert found.arguments == found.parts["params"] == 2 * config.num_parameters / 64
    assert found.parts["saved"] == found.parts["moments"] == found.parts["gradients"] == 0


def test_memory_of_adapters():
    config = preset("qwen3-32b", lora=Lora(rank=16), attention="splash", remat="full")
    found = estimate(config, {"fsdp": 64}, 1, 8192)
    adapters = 64 * adapter_parameters(config) / 64
    assert found.parts["moments"] == 2 * 4 * adapters
    assert found.parts["gradients"] == 4 * adapters
