"""A real Qwen3-0.6B shape, random weights: transformers' numbers and ours, through the commands.

Needs torch and transformers, 6 GiB of memory and a few minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import PRESETS
from model.hf import load_hf
from model.qwen3 import bind
from tools.cli import main

torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'remend[parity]'")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = [pytest.mark.service, pytest.mark.timeout(1200)]
PROMPT, NEW = 32, 128


class Reference(NamedTuple):
    folder: Path  # of the model
    ids: Path  # [1, PROMPT] .npy
    logits: np.ndarray  # [PROMPT, V] float32
    greedy: list[int]  # NEW tokens behind the prompt


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    """What transformers computes; its model is gone again before ours is loaded."""
    torch.manual_seed(0)
    hf = transformers.Qwen3Config(**PRESETS["qwen3-0.6b"].to_hf())
    model = transformers.Qwen3ForCausalLM(hf).float().eval()
    prompt = np.random.default_rng(0).integers(0, hf.vocab_size, (1, PROMPT))
    path = tmp_path_factory.mktemp("full")
    np.save(path / "ids.npy", prompt)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones at the start: a forgotten scale would not show
                parameter.uniform_(0.5, 1.5)
        logits = model(torch.tensor(prompt)).logits[0].numpy()
        greedy = model.generate(
            torch.tensor(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
    model.save_pretrained(path / "hf", max_shard_size="1500MB")
    return Reference(path / "hf", path / "ids.npy", logits, greedy[0, PROMPT:].tolist())


def test_logits(reference):
    policy = load_hf(reference.folder)
    tokens = jnp.asarray(np.load(reference.ids))
    network = bind(policy.config, policy.params)
    hidden, _ = network(tokens, jnp.arange(PROMPT)[None])
    difference = np.abs(np.asarray(hidden[0] @ network.head()) - reference.logits).max()
    relative = difference / np.abs(reference.logits).max()
    print(f"largest difference of logits relative to their scale: {relative:.1e}")
    assert relative <= 2e-5


def test_scores(reference, tmp_path):
    out = tmp_path / "out.npz"
    argv = ["score", str(reference.folder), "--ids", str(reference.ids), "--out", str(out)]
    assert main(argv) == 0
    logits = reference.logits.astype(np.float64)
    golden = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = golden[np.arange(PROMPT - 1), np.load(reference.ids)[0, 1:]]
    assert np.abs(np.load(out)["logprobs"][0] - want).max() <= 2e-5 * np.abs(logits).max()
    np.testing.assert_array_equal(np.load(out)["argmax"][0], logits.argmax(-1))


def test_greedy_decoding(reference, tmp_path):
    out = tmp_path / "out.npz"
    argv = ["generate", str(reference.folder), "--ids", str(reference.ids), "--out", str(out)]
    assert main([*argv, "--max-new", str(NEW)]) == 0
    assert np.load(out)["ids"][0].tolist() == reference.greedy
