"""The same random weights in transformers and in ours give the same numbers, variant by variant."""

from __future__ import annotations

import json
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
from model.rope import Yarn
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
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "yarn": {"rope_scaling": Yarn(4.0, 64)},
    "yarn, all settings": {
        "rope_scaling": Yarn(
            8.0, 32, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.0, truncate=False
        )
    },
    "yarn, own amplitude": {"rope_scaling": Yarn(2.0, 128, attention_factor=1.2)},
    "one head a group": {"num_key_value_heads": 6},
    "mixture": MIXTURE,
    "mixture, normalised, biased": MIXTURE | {"norm_topk_prob": True, "attention_bias": True},
    "mixture, one expert, tied, yarn": MIXTURE
    | {"num_experts_per_tok": 1, "tie_word_embeddings": True, "rope_scaling": Yarn(4.0, 64)},
}
variants = pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)


def _reference(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def _saved(folder: Path, change: dict):
    config = replace(CONFIG, **change)
    params = random_params(config, 3)
    save_hf(folder, params, config)
    return config, params, _reference(folder)


@variants
def test_logits_and_logprobs_match_transformers(tmp_path: Path, change: dict):
    config, params, reference = _saved(tmp_path / "ckpt", change)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 300))
    with torch.no_grad():
        logits = reference(torch.tensor(ids)).logits
    golden = torch.log_softmax(logits.double(), -1).numpy()

    model = bind(config, params)
    positions = np.broadcast_to(np.arange(300), (2, 300))
    hidden, _ = model(jnp.asarray(ids), jnp.asarray(positions))
    difference = np.abs(hidden @ model.head() - logits.numpy()).max()
    assert difference <= 2e-5 * np.abs(logits.numpy()).max()
    ours, entropy = token_logprobs(
        hidden[:, :-1].reshape(-1, config.hidden_size), model.head(), ids[:, 1:].reshape(-1)
    )
    want = np.take_along_axis(golden[:, :-1], ids[:, 1:, None], -1).reshape(-1)
    np.testing.assert_allclose(ours, want, atol=5e-5)
    want = -(np.exp(golden) * golden).sum(-1)[:, :-1].reshape(-1)
    np.testing.assert_allclose(entropy, want, atol=5e-5)


@variants
def test_gradients_match_transformers(tmp_path: Path, change: dict):
    """Of the mean log-probability, in every parameter, to 1e-4 of the largest; two query blocks."""
    config, params, reference = _saved(tmp_path / "ckpt", change)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 300))
    logits = reference(torch.tensor(ids)).logits[:, :-1].reshape(-1, config.vocab_size)
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[:, 1:].reshape(-1))).backward()
    with torch.no_grad():  # the gradients under the names that a checkpoint has
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    reference.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)

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
        want = theirs.pop(name)
        assert np.abs(grad - want).max() <= 1e-4 * np.abs(want).max() + 1e-9, name
    assert not theirs


@variants
def test_a_checkpoint_of_transformers_loads_bit_for_bit(tmp_path: Path, change: dict):
    """In shards; and what we then write is what transformers wrote."""
    config = replace(CONFIG, **change)
    save_hf(tmp_path / "seed", random_params(config, 5), config)
    reference = _reference(tmp_path / "seed")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    loaded = load_hf(tmp_path / "theirs")
    assert loaded.config == config
    save_hf(tmp_path / "ours", loaded.params, loaded.config, shard_bytes=70_000)
    want, got = (_tensors(tmp_path / name) for name in ("theirs", "ours"))
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert value.tobytes() == got[name].tobytes(), name

    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    ids = torch.arange(50)[None] % config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=0, atol=0)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    return {k: v for file in files for k, v in load_file(folder / file).items()}


@pytest.mark.parametrize("change", [{}, MIXTURE], ids=["dense", "mixture"])
def test_greedy_decoding_is_the_same(tmp_path: Path, change: dict):
    """128 tokens by the engine of the policy server, against ``generate``."""
    from model.decode import Engine
    from model.sampling import generate

    config, params, reference = _saved(tmp_path / "ckpt", change)
    prompt = [5, 17, 80, 3, 44, 9, 61]
    with torch.no_grad():
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=128, do_sample=False, eos_token_id=None
        )
    engine = Engine(params, config, slots=2, max_len=256)
    ours, _ = generate(engine, [prompt], max_new=128, temperature=0.0)
    assert ours[0] == theirs[0, len(prompt) :].tolist()
