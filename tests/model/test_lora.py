"""Adapters: no change at the start, the merged product afterwards, and nothing else is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.errors import InputError
from model.config import preset
from model.hf import save_hf
from model.lora import TARGETS, Lora, add_adapters, is_adapter, join, merged, split
from model.peft import save_peft
from model.qwen3 import Params, abstract, bind, logical_axes
from sft.learner import Learner, nll
from sft.packing import Example, microbatches, pack
from tests.model.conftest import random_params

LORA = Lora(rank=3, alpha=6.0)


def _hidden(config, params: Params) -> jax.Array:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 20)))
    return bind(config, params)(ids, jnp.broadcast_to(jnp.arange(20), (2, 20)))[0]


def _noisy(params: Params) -> Params:
    """Adapters at work: B is zero at the start."""
    rng = np.random.default_rng(1)
    layers = {
        name: jnp.asarray(rng.normal(size=a.shape) * 0.1, a.dtype) if is_adapter(name) else a
        for name, a in params["layers"].items()
    }
    return params | {"layers": layers}


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v")])
@pytest.mark.parametrize("scan", [True, False])
def test_fresh_adapters_change_nothing_and_merging_keeps_what_they_compute(
    small, small_params, targets, scan
):
    config = replace(small, lora=replace(LORA, targets=targets), scan_layers=scan)
    params = add_adapters(small_params, config.lora, 0)
    assert jax.tree.structure(params) == jax.tree.structure(abstract(config))
    assert jax.tree.structure(params) == jax.tree.structure(
        logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    plain = _hidden(replace(config, lora=None), small_params)
    np.testing.assert_allclose(_hidden(config, params), plain, atol=5e-6)
    params = _noisy(params)
    changed = _hidden(config, params)
    assert np.abs(changed - plain).max() > 1e-2
    np.testing.assert_allclose(_hidden(small, merged(params, config.lora)), changed, atol=2e-5)


def test_split_and_join(small_params):
    params = add_adapters(small_params, LORA, 0)
    trained, frozen = split(params)
    assert set(trained) == {"layers"} and all(map(is_adapter, trained["layers"]))
    assert join(trained, frozen).keys() == params.keys()
    assert split(small_params) == (small_params, {}) and join(small_params, {}) is small_params


def test_training_moves_the_adapters_alone(small, small_params):
    config = replace(small, lora=LORA)
    learner = Learner(config, optax.adam(1e-2), nll)
    data = [Example(list(range(1, 40)), [1.0] * 39)]
    rows = microbatches(pack(data, 64, 64), 1)
    state = learner.init(add_adapters(small_params, LORA, 0))
    losses = []
    for _ in range(5):
        state, metrics = learner.step(state, rows)
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0] - 0.1
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert {a.shape for a in moments} == {
        a.shape for a in jax.tree.leaves(split(state.params)[0])
    }  # no moments of frozen matrices
    for name, before in small_params["layers"].items():
        np.testing.assert_array_equal(state.params["layers"][name], before)
    np.testing.assert_array_equal(state.params["embed"], small_params["embed"])
    assert np.abs(state.params["layers"]["o_lora_b"]).max() > 0


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="rank"):
        Lora(rank=0)
    with pytest.raises(InputError, match="query"):
        Lora(targets=("query",))
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    with pytest.raises(InputError, match="experts"):
        preset("tiny", lora=LORA, **mixture)
    assert preset("tiny", lora=Lora(targets=("q", "o")), **mixture).lora


def test_export_needs_merging_and_is_written_whole(tmp_path: Path, small, small_params):
    config = replace(small, lora=LORA)
    params = add_adapters(small_params, LORA, 0)
    with pytest.raises(InputError, match="merge adapters"):
        save_hf(tmp_path / "whole", params, small)
    save_peft(tmp_path / "adapter", params, config, "base")
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (3, 6.0)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(InputError, match="no adapters"):
        save_peft(tmp_path / "other", small_params, small, "base")


def test_peft_computes_the_same(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = preset("tiny", vocab_size=97, num_hidden_layers=2, lora=Lora(4, 12.0))
    base = replace(config, lora=None)
    whole = random_params(base, 2)
    save_hf(tmp_path / "base", whole, base)
    params = _noisy(add_adapters(whole, config.lora, 0))
    save_peft(tmp_path / "adapter", params, config, str(tmp_path / "base"))
    reference = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "adapter",
    )
    ids = np.random.default_rng(0).integers(0, 97, (2, 20))
    with torch.no_grad():
        want = reference(torch.tensor(ids)).logits.numpy()
    model = bind(config, params)
    got = _hidden(config, params) @ model.head()
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
