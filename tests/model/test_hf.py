"""Hugging Face folders: exact round trip, and every kind of damage refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import InputError
from model.export_folder import MANIFEST
from model.hf import INDEX, WEIGHTS, fetched, load_hf, save_hf
from tests.model.conftest import random_params


def _same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_bit_for_bit(tmp_path, small, tied, dtype):
    config = replace(small, tie_word_embeddings=tied, param_dtype=dtype)
    params = random_params(config, 4)
    save_hf(tmp_path / "a", params, config)
    loaded = load_hf(tmp_path / "a", scan_layers=False)
    assert loaded.config == config
    _same(loaded.params, params)


def test_casts(tmp_path, small, small_params):
    save_hf(tmp_path / "a", small_params, small, dtype="bfloat16")
    half = load_hf(tmp_path / "a")
    assert half.config.param_dtype == "bfloat16"
    _same(half.params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), small_params))
    full = load_hf(tmp_path / "a", param_dtype="float32")
    assert full.config.param_dtype == "float32"
    assert full.params["embed"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("experts", [0, 4])
def test_a_copy_in_memory_is_written_like_what_it_was_made_of(tmp_path, small, dtype, experts):
    """In memory of its own: an optimizer's step overwrites that of the parameters."""
    config = replace(small, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=16)
    params = random_params(config if experts else small, 4)
    config = config if experts else small
    save_hf(tmp_path / "a", params, config, dtype=dtype)
    copied = fetched(params, config, dtype=dtype)
    assert jax.tree.structure(copied) == jax.tree.structure(params)
    for leaf, copy in zip(jax.tree.leaves(params), jax.tree.leaves(copied), strict=True):
        assert not np.shares_memory(np.asarray(leaf), copy)
    save_hf(tmp_path / "b", copied, config, dtype=dtype)
    for name in (WEIGHTS, MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names_and_orientation_are_those_of_transformers(tmp_path, small, small_params):
    save_hf(tmp_path / "a", small_params, small)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    layers = small_params["layers"]
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.k_proj.weight"], layers["k"][1].T
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.post_attention_layernorm.weight"], layers["mlp_norm"][0]
    )
    assert "lm_head.weight" not in tensors
    assert len(tensors) == 2 + 11 * small.num_hidden_layers


@pytest.fixture
def folder(tmp_path, small, small_params) -> Path:
    save_hf(tmp_path / "ckpt", small_params, small, meta={"version": 3})
    return tmp_path / "ckpt"


def _foreign(folder: Path) -> dict[str, np.ndarray]:
    """Make it a folder without our manifest; its tensors."""
    (folder / MANIFEST).unlink()
    return load_file(folder / WEIGHTS)


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        load_hf(folder)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_damage_is_seen_through_the_manifest(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # in a tensor, or white space turned into something else
    path.write_bytes(bytes(data))
    _refused(folder, name)
    path.write_bytes(bytes(data[:-5]))
    _refused(folder, name)
    path.unlink()
    _refused(folder, name)


def test_truncation_is_seen_without_a_manifest(folder):
    _foreign(folder)
    path = folder / WEIGHTS
    data = path.read_bytes()
    for size in (0, 4, 8, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        _refused(folder, WEIGHTS, "truncated")


def test_a_tensor_that_is_missing_extra_or_misshapen_is_named(folder):
    tensors = _foreign(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS)
    _refused(folder, name, "missing")
    save_file(tensors | {name: tensors[name][:-1]}, folder / WEIGHTS)
    _refused(folder, name, "(47, 32)", "(48, 32)")
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": tensors[name]}, folder / WEIGHTS)
    _refused(folder, "model.layers.2.mlp.up_proj.weight", "unexpected")
    save_file(tensors | {name: tensors[name].astype(np.float16)}, folder / WEIGHTS)
    _refused(folder, name, "F16")


def test_a_tied_head_may_be_stored_but_not_differ(folder, small_params):
    tensors = _foreign(folder)
    embed = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed}, folder / WEIGHTS)
    _same(load_hf(folder).params, small_params)
    save_file(tensors | {"lm_head.weight": embed + 1}, folder / WEIGHTS)
    _refused(folder, "lm_head.weight")


def test_shards_are_read_together(folder, small_params):
    tensors = _foreign(folder)
    (folder / WEIGHTS).unlink()
    shards = {"x-1.safetensors": {}, "x-2.safetensors": {}}
    for i, (name, value) in enumerate(tensors.items()):
        shards[f"x-{1 + i % 2}.safetensors"][name] = value
    for name, shard in shards.items():
        save_file(shard, folder / name)
    weight_map = {tensor: file for file, shard in shards.items() for tensor in shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    _same(load_hf(folder).params, small_params)
    (folder / "x-2.safetensors").unlink()
    _refused(folder, "x-2.safetensors")


def test_a_write_that_fails_leaves_the_old_folder(folder, small, small_params, monkeypatch):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    broken = dict(small_params, norm=jnp.zeros(5))
    with pytest.raises(InputError, match="norm"):
        save_hf(folder, broken, small)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["ckpt"]  # and nothing beside it
    save_hf(folder, random_params(small, 1), small)
    assert not np.array_equal(load_hf(folder).params["embed"], small_params["embed"])


def test_a_folder_of_something_else_is_not_overwritten(tmp_path, small, small_params):
    (tmp_path / "thesis.txt").write_text("only copy")
    with pytest.raises(InputError, match="not an earlier export"):
        save_hf(tmp_path, small_params, small)
    assert (tmp_path / "thesis.txt").read_text() == "only copy"


def test_a_missing_folder_or_tokenizer_is_one_clear_error(tmp_path, folder):
    _refused(tmp_path / "nothing", "config.json")
    with pytest.raises(InputError, match="tokenizer.json"):
        _ = load_hf(folder).tokenizer
    shutil.rmtree(folder)


def test_a_store_without_its_driver_is_one_clear_error(small, small_params):
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match="gcsfs"):
        save_hf("gs://bucket/policy", small_params, small)


@pytest.fixture
def store(monkeypatch):
    """A stand-in for Google's object store behind the real etils.epath."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store: dict = {}

    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "gcs", Store)
    return Store.store


def test_an_object_store_gets_the_files_and_the_manifest_last(store, tmp_path, small, small_params):
    save_hf("gs://bucket/policy", small_params, small, shard_bytes=20_000)
    (tmp_path / "copy").mkdir()
    names = []
    for path, file in store.items():
        names.append(Path(path).name)
        (tmp_path / "copy" / names[-1]).write_bytes(file.getvalue())
    assert len([n for n in names if n.endswith(".safetensors")]) > 1
    assert names[-1] == MANIFEST
    _same(load_hf(tmp_path / "copy").params, small_params)


MESH = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from model.hf import load_hf, save_hf
from model.sharding import make_mesh, param_shardings
folder = Path(sys.argv[1])
mesh = make_mesh({"data": 2, "fsdp": 2})
whole = load_hf(folder)
shared = load_hf(folder, shardings=lambda config: param_shardings(config, mesh))
spread = 0
for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(shared.params), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    spread += not b.sharding.is_fully_replicated
assert spread > 3, spread
save_hf(folder.with_name("again"), shared.params, shared.config)
"""


@pytest.mark.parametrize("experts", [0, 4])
def test_parameters_go_to_a_mesh_and_come_back(tmp_path, small, experts):
    config = small
    if experts:
        config = replace(
            small, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=12
        )
    save_hf(tmp_path / "a", random_params(config, 2), config)
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    weights = (tmp_path / "a" / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == weights
