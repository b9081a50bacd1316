"""MaxText checkpoints: exact both ways, in its names and layouts, and whatever differs refused.

What MaxText itself makes of them is in ``tests/service/test_maxtext.py``.
"""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from configs.errors import InputError
from model import maxtext
from model.config import Qwen3Config
from model.lora import Lora
from model.maxtext import FLAGS, ITEMS, load_maxtext, maxtext_flags, save_maxtext
from model.qwen3 import Params
from model.rope import Yarn
from model.sharding import data_mesh, param_shardings
from tests.model.conftest import SMALL, random_params

# Orbax abandons its other reads when one fails; they complain when they are collected: here, then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DENSE = replace(SMALL, num_hidden_layers=3, tie_word_embeddings=False)
MIXTURE = replace(
    DENSE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
)
CONFIGS = {
    "untied": DENSE,
    "tied": replace(DENSE, tie_word_embeddings=True),
    "half": replace(DENSE, tie_word_embeddings=True, param_dtype="bfloat16"),
    "mixture": MIXTURE,
    "half mixture": replace(MIXTURE, param_dtype="bfloat16"),
    "yarn": replace(DENSE, rope_scaling=Yarn(4.0, 128)),
}


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def _same(got: Params, want: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _layer(params: Params, config: Qwen3Config, i: int) -> dict[str, Any]:
    """Layer i in MaxText's tree, written down without the table under test."""
    p = {name: np.asarray(value[i]) for name, value in params["layers"].items()}
    d, hd = config.hidden_size, config.head_dim
    tree: dict[str, Any] = {
        "pre_self_attention_layer_norm": {"scale": p["attn_norm"]},
        "post_self_attention_layer_norm": {"scale": p["mlp_norm"]},
        "self_attention": {
            "query": {"kernel": p["q"].reshape(d, config.num_attention_heads, hd)},
            "key": {"kernel": p["k"].reshape(d, config.num_key_value_heads, hd)},
            "value": {"kernel": p["v"].reshape(d, config.num_key_value_heads, hd)},
            "out": {"kernel": p["o"].reshape(config.num_attention_heads, hd, d)},
            "query_norm": {"scale": p["q_norm"]},
            "key_norm": {"scale": p["k_norm"]},
        },
    }
    if config.num_experts:
        experts = {"wi_0": p["gate"], "wi_1": p["up"], "wo": p["down"]}
        return tree | {"moe_block": {"gate": {"kernel": p["router"]}, **experts}}
    matrices = {"wi_0": p["gate"], "wi_1": p["up"], "wo": p["down"]}
    return tree | {"mlp": {name: {"kernel": value} for name, value in matrices.items()}}


def _tree(params: Params, config: Qwen3Config, *, scanned: bool) -> dict[str, Any]:
    """The parameters as MaxText's tree of weights."""
    layers = [_layer(params, config, i) for i in range(config.num_hidden_layers)]
    decoder: dict[str, Any] = {"decoder_norm": {"scale": np.asarray(params["norm"])}}
    if scanned:
        decoder["layers"] = jax.tree.map(lambda *each: np.stack(each, axis=1), *layers)
    else:
        decoder |= {f"layers_{i}": layer for i, layer in enumerate(layers)}
    if "lm_head" in params:
        decoder["logits_dense"] = {"kernel": np.asarray(params["lm_head"])}
    return {"decoder": decoder, "token_embedder": {"embedding": np.asarray(params["embed"])}}


def _write(path: Path, tree: Any, **options: Any) -> Path:
    """A tree by plain Orbax calls."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(item=tree))
    return path


def _read(path: Path) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_round_trip_bit_for_bit(tmp_path, config):
    params = random_params(config, 4)
    save_maxtext(tmp_path / "a", params, config)
    got, loaded = load_maxtext(tmp_path / "a", scan_layers=False)
    assert got == config
    _same(loaded, params)
    again, loaded = load_maxtext(tmp_path / "a" / ITEMS, config)
    assert again == config
    _same(loaded, params)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_names_shapes_and_orientation_are_maxtexts(tmp_path, config):
    params = random_params(config, 4)
    save_maxtext(tmp_path / "a", params, config)
    _same(
        _read(tmp_path / "a" / ITEMS), {"params": {"params": _tree(params, config, scanned=True)}}
    )
    step = json.loads((tmp_path / "a" / "_CHECKPOINT_METADATA").read_text())
    assert step["custom_metadata"] == {"scan_layers": True}  # MaxText compares its flag with it


def test_a_large_tensor_is_stored_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(maxtext, "_CHUNK_BYTES", 1000)
    params = random_params(DENSE, 4)
    save_maxtext(tmp_path / "a", params, DENSE)
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata((tmp_path / "a" / ITEMS).absolute()).tree["params"]["params"]
    assert np.prod(tree["token_embedder"]["embedding"].storage.chunk_shape) <= 250
    _same(load_maxtext(tmp_path / "a")[1], params)


def _as_nnx(tree: Any) -> Any:
    """Every leaf under a key ``value``, as NNX trees are saved."""
    return jax.tree.map(lambda leaf: {"value": leaf}, tree)


def _training(tree: Any) -> Any:
    moments = {"params": jax.tree.map(np.zeros_like, tree)}
    return {
        "params": {"params": tree},
        "opt_state": [{"count": np.int32(7), "mu": moments}, None],
        "step": np.int32(7),
        "nnx_aux": {"model": {"decoder": {"rngs": {"params": {"count": np.uint32(1)}}}}},
    }


def _with_random_state(tree: Any) -> Any:
    tree = _as_nnx(tree)
    tree["decoder"]["rngs"] = {"params": {"count": {"value": np.uint32(1)}}}
    return {"base": tree}


def _layers_by_key(tree: Any) -> Any:
    """``layers/0`` for ``layers_0``, as a list of layers is saved."""
    decoder = tree["decoder"]
    apart = {name.removeprefix("layers_"): decoder[name] for name in decoder if "layers_" in name}
    rest = {name: value for name, value in decoder.items() if "layers_" not in name}
    return _as_nnx(tree | {"decoder": rest | {"layers": apart}})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "apart"])
def test_a_training_checkpoint_is_read_bit_for_bit(tmp_path, config, scanned):
    params = random_params(config, 5)
    _write(tmp_path / "7" / "items", _training(_tree(params, config, scanned=scanned)))
    _write(tmp_path / "10" / "items", _training(_tree(params, config, scanned=scanned)))
    for name in ("9", "10.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    for path in (tmp_path, tmp_path / "7", tmp_path / "7" / "items"):
        got, loaded = load_maxtext(path, config)
        assert got == config
        _same(loaded, params)


@pytest.mark.parametrize(
    ("scanned", "around", "options"),
    [
        (True, lambda t: {"params": t}, {}),
        (True, lambda t: t, {"use_zarr3": True}),
        (True, _with_random_state, {"use_ocdbt": False}),
        (False, _as_nnx, {"use_ocdbt": False, "use_zarr3": True}),
        (False, _layers_by_key, {}),
    ],
    ids=["params", "bare", "reinforcement learning", "nnx", "list of layers"],
)
def test_other_trees_around_the_weights_are_read(tmp_path, scanned, around, options):
    params = random_params(DENSE, 5)
    _write(tmp_path / "items", around(_tree(params, DENSE, scanned=scanned)), **options)
    _same(load_maxtext(tmp_path, DENSE)[1], params)


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "apart"])
def test_a_single_layer_is_not_taken_for_a_stack(tmp_path, scanned):
    config = replace(DENSE, num_hidden_layers=1)
    params = random_params(config, 5)
    _write(tmp_path / "items", {"params": {"params": _tree(params, config, scanned=scanned)}})
    _same(load_maxtext(tmp_path, config)[1], params)


def test_casts(tmp_path):
    params = random_params(DENSE, 4)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    save_maxtext(tmp_path / "a", params, DENSE, dtype="bfloat16")
    config, loaded = load_maxtext(tmp_path / "a")
    assert config.param_dtype == "bfloat16"
    _same(loaded, half)
    config, loaded = load_maxtext(tmp_path / "a", param_dtype="float32")
    assert config.param_dtype == "float32"
    _same(loaded, jax.tree.map(lambda a: a.astype(jnp.float32), half))
    with pytest.raises(InputError, match="dtype must be one of"):
        save_maxtext(tmp_path / "b", params, DENSE, dtype="float16")
    with pytest.raises(InputError, match="dtype must be one of"):
        load_maxtext(tmp_path / "a", param_dtype="float16")


def test_each_parameter_goes_where_it_is_told(tmp_path):
    params = random_params(DENSE, 4)
    save_maxtext(tmp_path / "a", params, DENSE)
    mesh = data_mesh(1)
    loaded = load_maxtext(tmp_path / "a", shardings=lambda c: param_shardings(c, mesh))[1]
    _same(loaded, params)
    assert jax.tree.map(lambda a: a.sharding, loaded) == param_shardings(DENSE, mesh)


def test_parameters_come_to_the_host_one_by_one(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    read = maxtext._Pending.read

    def counted(self):
        assert not [ref for ref in alive if ref() is not None]
        value = read(self)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(maxtext._Pending, "read", counted)
    save_maxtext(tmp_path / "a", random_params(DENSE, 4), DENSE, dtype="bfloat16")
    assert len(alive) == 14


def test_flags_name_what_changes_the_numbers(tmp_path):
    save_maxtext(tmp_path / "a", random_params(MIXTURE, 4), MIXTURE, dtype="bfloat16")
    assert yaml.safe_load((tmp_path / "a" / FLAGS).read_text()) == {
        "base_config": "base.yml",
        "decoder_block": "qwen3_moe",
        "base_emb_dim": 32,
        "base_num_query_heads": 4,
        "base_num_kv_heads": 2,
        "head_dim": 8,
        "base_mlp_dim": 24,
        "base_num_decoder_layers": 3,
        "vocab_size": 101,
        "mlp_activations": ["silu", "linear"],
        "normalization_layer_epsilon": 1e-6,
        "use_qk_norm": True,
        "rope_max_timescale": 10_000,
        "logits_via_embedding": False,
        "normalize_embedding_logits": False,
        "enable_dropout": False,
        "scan_layers": True,
        "param_scan_axis": 1,
        "dtype": "float32",
        "weight_dtype": "bfloat16",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "base_moe_mlp_dim": 24,
        "norm_topk_prob": True,
    }
    flags = maxtext_flags(replace(DENSE, rope_scaling=Yarn(4.0, 256)), "float32")
    assert flags["decoder_block"] == "qwen3" and "num_experts" not in flags
    assert flags["rope_type"] == "yarn" and flags["rope_factor"] == 4
    assert flags["max_position_embeddings"] == 1024  # its table of angles must reach that far
    assert flags["rope_attention_scaling"] is True and flags["rope_interleave"] is False
    plain = maxtext_flags(
        replace(DENSE, rope_scaling=Yarn(4.0, 64, attention_factor=1.0)), "float32"
    )
    assert plain["rope_attention_scaling"] is False and plain["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"lora": Lora(rank=2, targets=("q",))}, "lora"),
        ({"rope_theta": 10_000.5}, "rope_theta"),
        ({"rope_scaling": Yarn(1.5, 64)}, "factor=1.5"),
        ({"rope_scaling": Yarn(4.0, 64, beta_fast=32.5)}, "beta_fast"),
        ({"rope_scaling": Yarn(4.0, 64, attention_factor=1.3)}, "times 1.3"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
            "norm_topk_prob",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_maxtext_cannot_hold_is_refused_by_name(tmp_path, changes, words):
    config = replace(DENSE, **changes)
    with pytest.raises(InputError, match=f"MaxText cannot hold this model: .*{words}"):
        save_maxtext(tmp_path / "a", random_params(config, 0), config)
    assert list(tmp_path.iterdir()) == []
    if config.lora is None:
        save_maxtext(tmp_path / "a", random_params(DENSE, 0), DENSE)
        with pytest.raises(InputError, match=words):
            load_maxtext(tmp_path / "a", config)


def _refused(path: Path, config: Qwen3Config | None, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as error:
        load_maxtext(path, config, **options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "apart"])
def test_a_tensor_that_is_missing_extra_or_misshapen_is_named(tmp_path, scanned, monkeypatch):
    """And nothing has been read by then."""
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", None)
    params = random_params(DENSE, 0)
    layer = "layers" if scanned else "layers_1"
    where = f"'decoder/{layer}/mlp/wi_1/kernel'"

    def changed(name: str, change: Any) -> Path:
        tree = _tree(params, DENSE, scanned=scanned)
        mlp = tree["decoder"][layer]["mlp"]
        change(mlp, mlp["wi_1"]["kernel"])
        return _write(tmp_path / name, {"params": {"params": tree}})

    _refused(changed("a", lambda mlp, value: mlp.pop("wi_1")), DENSE, where, "missing")
    path = changed("b", lambda mlp, value: mlp.update(wi_1={"kernel": value[:-1]}))
    own = (31, 3, 48) if scanned else (31, 48)
    _refused(path, DENSE, where, str(own), str((32, *own[1:])))
    path = changed("c", lambda mlp, value: mlp.update(wi_2={"kernel": value}))
    _refused(path, DENSE, f"'decoder/{layer}/mlp/wi_2/kernel'", "unexpected")
    path = changed("d", lambda mlp, value: mlp.update(wi_1={"kernel": value.astype(np.float16)}))
    _refused(path, DENSE, where, "float16")
    path = changed("e", lambda mlp, value: mlp.update(wi_1={"kernel": value.astype(jnp.bfloat16)}))
    _refused(path, DENSE, "bfloat16 and float32", "param_dtype")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tree = _tree(random_params(DENSE, 0), DENSE, scanned=False)
    path = _write(tmp_path / "a", {"params": {"params": tree}})
    _refused(path, replace(DENSE, num_hidden_layers=2), "'decoder/layers_2/", "unexpected")
    _refused(path, replace(DENSE, num_hidden_layers=4), "'decoder/layers_3/", "missing")
    _refused(path, replace(DENSE, vocab_size=100), "'token_embedder/embedding'", "(101, 32)")
    _refused(
        path,
        replace(DENSE, tie_word_embeddings=True),
        "'decoder/logits_dense/kernel'",
        "unexpected",
    )
    _refused(path, MIXTURE, "'decoder/layers_0/moe_block/gate/kernel'", "missing")
    quantized = {"params": {"params": tree, "aqt": {"scale": np.zeros(3, np.float32)}}}
    _refused(_write(tmp_path / "b", quantized), DENSE, "'aqt'", "unexpected")


def test_a_path_without_checkpoint_or_config_is_one_clear_error(tmp_path):
    _refused(tmp_path / "nothing", DENSE, "holds no MaxText checkpoint")
    _refused(tmp_path, DENSE, "holds no MaxText checkpoint")
    tree = {"params": {"params": _tree(random_params(DENSE, 0), DENSE, scanned=True)}}
    _refused(_write(tmp_path / "items", tree), None, "say which config")


def _largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    for name, damage in {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "gone": Path.unlink,
    }.items():
        save_maxtext(tmp_path / name, random_params(DENSE, 0), DENSE)
        damage(_largest(tmp_path / name))
        _refused(tmp_path / name, None, ITEMS, "cannot be read")
    save_maxtext(tmp_path / "c", random_params(DENSE, 0), DENSE)
    (tmp_path / "c" / ITEMS / "_METADATA").write_text("{")
    _refused(tmp_path / "c", None, ITEMS, "cannot be read")
    (tmp_path / "c" / "config.json").write_text("{")
    _refused(tmp_path / "c", None, "config.json", "not valid JSON")


def test_parameters_that_are_not_the_configs_are_refused(tmp_path):
    params = random_params(DENSE, 0)
    layers = params["layers"]
    for broken, words in [
        (params | {"norm": jnp.zeros(5)}, "norm has shape"),
        (params | {"layers": {n: v for n, v in layers.items() if n != "k"}}, "k is missing"),
        (params | {"layers": layers | {"router": layers["q"]}}, "router has no place"),
        (params | {"norm": params["norm"].astype(jnp.bfloat16)}, "bfloat16 and float32"),
    ]:
        with pytest.raises(InputError, match=words):
            save_maxtext(tmp_path / "a", broken, DENSE)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "ckpt"
    params = random_params(DENSE, 0)
    save_maxtext(folder, params, DENSE)
    with monkeypatch.context() as patch:
        patch.setattr(maxtext._Pending, "read", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_maxtext(folder, random_params(DENSE, 1), DENSE)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]  # and nothing beside it
    _same(load_maxtext(folder)[1], params)
    save_maxtext(folder, random_params(DENSE, 1), DENSE)
    _same(load_maxtext(folder)[1], random_params(DENSE, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("only copy")
    with pytest.raises(InputError, match="not an earlier export"):
        save_maxtext(tmp_path, random_params(DENSE, 0), DENSE)
    assert (tmp_path / "thesis.txt").read_text() == "only copy"
    shutil.rmtree(tmp_path)
