"""The same random weights in transformers' Qwen3ForCausalLM and in ours give the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Qwen3Config
from model.hf import load_hf, save_hf
from model.logprobs import token_logprobs
from model.qwen3 import bind, init

torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'remend[parity]'")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

CONFIG = Qwen3Config(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=5_000_000.0,  # not the library's default: an ignored theta shows
    max_position_embeddings=1024,
)


def _random_params(config: Qwen3Config):
    """Fresh weights with norm scales away from one, so that a forgotten scale shows."""
    rng = np.random.default_rng(3)
    params = init(config, 3)
    for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"):
        value = params["layers"][name]
        params["layers"][name] = jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
    return params


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_logprobs_match_transformers(tmp_path: Path, tied: bool):
    config = replace(CONFIG, tie_word_embeddings=tied)
    params = _random_params(config)
    save_hf(tmp_path / "ckpt", params, config)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ckpt", dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 300))
    with torch.no_grad():
        logits = reference(torch.tensor(ids)).logits
    golden = torch.log_softmax(logits.double(), -1).numpy()

    model = bind(config, params)
    positions = np.broadcast_to(np.arange(300), (2, 300))
    hidden, _ = model(jnp.asarray(ids), jnp.asarray(positions))
    np.testing.assert_allclose(hidden @ model.head(), logits.numpy(), atol=2e-4, rtol=1e-4)
    ours, entropy = token_logprobs(
        hidden[:, :-1].reshape(-1, config.hidden_size), model.head(), ids[:, 1:].reshape(-1)
    )
    want = np.take_along_axis(golden[:, :-1], ids[:, 1:, None], -1).reshape(-1)
    np.testing.assert_allclose(ours, want, atol=5e-5)
    want = -(np.exp(golden) * golden).sum(-1)[:, :-1].reshape(-1)
    np.testing.assert_allclose(entropy, want, atol=5e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_transformers_loads_bit_for_bit(tmp_path: Path, tied: bool):
    hf = transformers.Qwen3Config(**replace(CONFIG, tie_word_embeddings=tied).to_hf())
    reference = transformers.Qwen3ForCausalLM(hf)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = load_hf(tmp_path)
    config, params = loaded.config, loaded.params
    assert config == replace(CONFIG, tie_word_embeddings=tied)
    state = reference.state_dict()
    np.testing.assert_array_equal(params["embed"], state["model.embed_tokens.weight"].numpy())
    for i in range(config.num_hidden_layers):
        theirs = state[f"model.layers.{i}.mlp.down_proj.weight"].numpy()
        np.testing.assert_array_equal(params["layers"]["down"][i], theirs.T)
