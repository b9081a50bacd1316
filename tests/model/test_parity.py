"""The same random weights in transformers' Qwen3ForCausalLM and in ours give the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from model.config import Qwen3Config
from model.hf import WEIGHTS, load_hf, save_hf
from model.logprobs import token_logprobs
from model.qwen3 import bind
from tests.model.conftest import random_params

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


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_logprobs_match_transformers(tmp_path: Path, tied: bool):
    config = replace(CONFIG, tie_word_embeddings=tied)
    params = random_params(config, 3)
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


def test_gradients_match_transformers(tmp_path: Path):
    """Of the mean log-probability, in every kind of parameter; two query blocks long."""
    config = replace(CONFIG, tie_word_embeddings=True)
    params = random_params(config, 3)
    save_hf(tmp_path / "ckpt", params, config)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ckpt", dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 300))
    logits = reference(torch.tensor(ids)).logits[:, :-1].reshape(-1, config.vocab_size)
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[:, 1:].reshape(-1))).backward()
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    @jax.jit
    @jax.grad
    def ours(params):
        model = bind(config, params)
        hidden, _ = model(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(300), (2, 300)))
        flat = hidden[:, :-1].reshape(-1, config.hidden_size)
        return -token_logprobs(flat, model.head(), ids[:, 1:].reshape(-1))[0].mean()

    grads = ours(params)
    save_hf(tmp_path / "grads", grads, config)  # under transformers' names, in its orientation
    for name, grad in load_file(tmp_path / "grads" / WEIGHTS).items():
        np.testing.assert_allclose(grad, theirs.pop(name), atol=2e-6, rtol=1e-3, err_msg=name)
    assert not theirs


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
