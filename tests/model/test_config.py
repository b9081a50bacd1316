"""Translation to and from Hugging Face's config.json, and what is refused."""

from __future__ import annotations

import pytest

from configs.errors import InputError
from model.config import PRESETS, Qwen3Config, preset
from model.qwen3 import abstract
from model.rope import Yarn


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str):
    config = PRESETS[name]
    again = Qwen3Config.from_hf(config.to_hf(), dtype=config.dtype, scan_layers=config.scan_layers)
    assert again == config


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.721),
        ("qwen3-4b", 4.022),
        ("qwen3-8b", 8.191),
        ("qwen3-14b", 14.768),
        ("qwen3-32b", 32.762),
        ("qwen3-30b-a3b", 30.532),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float):
    assert PRESETS[name].num_parameters / 1e9 == pytest.approx(billions, abs=5e-4)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    "change", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}, MIXTURE]
)
def test_num_parameters_counts_what_the_model_has(change: dict):
    import jax

    config = preset("tiny", **change)
    assert config.num_parameters == sum(a.size for a in jax.tree.leaves(abstract(config)))


@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": 0.1},
        {"decoder_sparse_step": 2},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},  # against rope_parameters
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "ramp": 2}},
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},  # against top level
        {"use_sliding_window": True},
        {"layer_types": ["sliding_attention"] * 4},
        {"num_experts": 128},
        {"hidden_act": "gelu"},
        {"quantization_config": {"bits": 4}},
        {"model_type": "qwen2"},
        {"a_field_from_the_future": 1},
        {"vocab_size": None},
        {"num_key_value_heads": 3},
        {"head_dim": 33},
        {"hidden_size": "128"},
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict):
    with pytest.raises(InputError) as error:
        Qwen3Config.from_hf(PRESETS["tiny"].to_hf() | change)
    assert next(iter(change)).split("_")[0] in str(error.value)


def test_rope_theta_is_read_from_either_place():
    hf = PRESETS["tiny"].to_hf() | {"rope_theta": 7e6, "rope_parameters": None}
    assert Qwen3Config.from_hf(hf).rope_theta == 7e6
    hf["rope_parameters"] = {"rope_theta": hf.pop("rope_theta"), "rope_type": "default"}
    assert Qwen3Config.from_hf(hf).rope_theta == 7e6
    hf["rope_parameters"] = None
    with pytest.raises(InputError, match="rope_theta is missing"):
        Qwen3Config.from_hf(hf)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_yarn_is_read_from_either_place():
    hf = PRESETS["tiny"].to_hf() | {"rope_parameters": None, "rope_scaling": YARN}
    want = Yarn(4.0, 32768)
    assert Qwen3Config.from_hf(hf).rope_scaling == want
    hf["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in YARN.items()}
    assert Qwen3Config.from_hf(hf).rope_scaling == want
    hf["rope_parameters"] = {"rope_theta": 10_000.0, **YARN}
    del hf["rope_scaling"]
    config = Qwen3Config.from_hf(hf)
    assert config.rope_scaling == want
    assert Qwen3Config.from_hf(config.to_hf(), dtype=config.dtype) == config


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_are_read_under_both_names(name: str):
    hf = PRESETS["qwen3-30b-a3b"].to_hf()
    hf[name] = hf.pop("num_experts")
    assert Qwen3Config.from_hf(hf).num_experts == 128
    with pytest.raises(InputError, match="num_experts"):
        Qwen3Config.from_hf(hf | {"num_experts": 8, "num_local_experts": 4})
    with pytest.raises(InputError, match="num_experts_per_tok"):
        Qwen3Config.from_hf(hf | {"num_experts_per_tok": 129})


def test_unknown_preset_and_field():
    with pytest.raises(InputError, match="tiny"):
        preset("qwen3-7b")
    with pytest.raises(InputError, match="n_layers"):
        preset("tiny", n_layers=3)
    with pytest.raises(InputError, match="remat"):
        preset("tiny", remat="some")
