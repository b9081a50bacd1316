"""Against the real MaxText: it loads what we write and says the same, we read what it saves.

Needs a Python (3.12 or newer) with MaxText, named in REMEND_MAXTEXT_PYTHON. MaxText runs once, as a
process of its own (``maxtext_peer.py``), in about two minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Qwen3Config
from model.maxtext import FLAGS, ITEMS, load_maxtext, save_maxtext
from model.qwen3 import Params, bind
from model.rope import Yarn
from tests.model.conftest import SMALL, random_params

PYTHON = os.environ.get("REMEND_MAXTEXT_PYTHON")

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not PYTHON, reason="REMEND_MAXTEXT_PYTHON names no Python with MaxText"),
    pytest.mark.timeout(1200),
]

UNTIED = replace(SMALL, num_hidden_layers=3, tie_word_embeddings=False)
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
CONFIGS = {
    "untied": UNTIED,
    "tied": replace(UNTIED, tie_word_embeddings=True),
    "mixture": replace(UNTIED, **EXPERTS),
    # a context so short that positions of the test lie on both sides of it; and bfloat16 weights
    "yarn": replace(UNTIED, rope_scaling=Yarn(4.0, 8), param_dtype="bfloat16"),
}
IDS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 24)).astype(np.int32)


@dataclass(frozen=True)
class Ran:
    """What MaxText left of one config: in ``folder`` our export ``ours`` and what it made of it
    (``logits.npy``, ``training``, ``params``), and a model of its own (``own.npy``, ``own``)."""

    folder: Path
    config: Qwen3Config
    params: Params


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Mapping[str, Ran]:
    root = tmp_path_factory.mktemp("maxtext")
    np.save(root / "ids.npy", IDS)
    jobs, made = [], {}
    for name, config in CONFIGS.items():
        folder, params = root / name, random_params(config, 1)
        save_maxtext(folder / "ours", params, config)
        made[name] = Ran(folder, config, params)
        job = {"flags": str(folder / "ours" / FLAGS), "ids": str(root / "ids.npy")}
        args = {"base_output_directory": str(folder)}
        jobs += [
            job
            | {
                "args": args,
                "load": str(folder / "ours" / ITEMS),
                "logits": str(folder / "logits.npy"),
                "save": {kind: str(folder / kind) for kind in ("training", "params")},
            },
            job
            | {
                "args": args | {"scan_layers": "false"},
                "load": None,
                "logits": str(folder / "own.npy"),
                "save": {"training": str(folder / "own")},
            },
        ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("maxtext_peer.py"))]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, str(root / "jobs.json")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def _difference(config: Qwen3Config, params: Params, theirs: Path, *, rounded: bool) -> float:
    """Largest difference of logits, relative to the largest logit; with a head rounded to bfloat16
    or not."""
    model, positions = bind(config, params), jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    head = model.head()
    if rounded:
        head = head.astype(jnp.bfloat16).astype(jnp.float32)
    ours = np.asarray(model(jnp.asarray(IDS), positions)[0] @ head.astype(jnp.float32))
    want = np.load(theirs)
    assert want.shape == (*IDS.shape, config.vocab_size) and want.dtype == np.float32
    return float(np.abs(ours - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_maxtext_loads_our_export_and_says_the_same(ran, name):
    """Both of its loaders: the peer compares them bit for bit."""
    it = ran[name]
    theirs = it.folder / "logits.npy"
    tied = it.config.tie_word_embeddings
    assert _difference(it.config, it.params, theirs, rounded=tied) <= 2e-5
    if tied:  # what model/maxtext.py says of MaxText; when this fails, MaxText has changed
        assert 1e-4 < _difference(it.config, it.params, theirs, rounded=False) < 1e-2
    if it.config.rope_scaling:  # and it was not forgotten on both sides
        plain = replace(it.config, rope_scaling=None)
        assert _difference(plain, it.params, theirs, rounded=False) > 1e-2


@pytest.mark.parametrize("kind", ["training", "params"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_maxtext_saves_is_read_bit_for_bit(ran, name, kind):
    it = ran[name]
    config, params = load_maxtext(it.folder / kind, it.config)
    assert config == it.config
    assert jax.tree.structure(params) == jax.tree.structure(it.params)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(it.params), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_maxtexts_own_says_the_same_here(ran, name):
    """Its own parameters, its layers apart: a mapping that is wrong both ways would show."""
    it = ran[name]
    config, params = load_maxtext(it.folder / "own", it.config)
    tied = config.tie_word_embeddings
    assert _difference(config, params, it.folder / "own.npy", rounded=tied) <= 2e-5
