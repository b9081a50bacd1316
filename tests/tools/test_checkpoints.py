"""`remend convert`, `score` and `generate`, as a user calls them, on small real folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.export_folder import MANIFEST
from model.folder import load_policy
from model.hf import INDEX, WEIGHTS, load_hf, save_hf
from tests.model.conftest import SMALL, random_params
from tools.cli import main

MIXTURE = replace(
    SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    config = replace(SMALL, vocab_size=tokenizer.vocab_size)
    save_hf(folder, random_params(config, 0), config, tokenizer)
    return folder


def _same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("through", ["orbax", "maxtext"])
def test_there_and_back_is_the_same_bits_and_the_same_files(source, tmp_path, through, capsys):
    middle, back = tmp_path / "middle", tmp_path / "back"
    assert main(["convert", str(source), str(middle), "--to", through, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() >= {"tensors", "bytes", "seconds", "peak_rss_gib"}
    assert report["bytes"] == sum(v.nbytes for v in load_file(source / WEIGHTS).values())
    assert main(["convert", str(middle), str(back), "--to", "hf", "--shard-gb", "2e-5"]) == 0
    shards = set(json.loads((back / INDEX).read_text())["weight_map"].values())
    assert len(shards) > 1
    got = {k: v for name in shards for k, v in load_file(back / name).items()}
    want = load_file(source / WEIGHTS)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].tobytes() == value.tobytes()
    _same(load_policy(middle).params, load_hf(source).params)
    # everything that travels with the weights
    assert _files(back) - shards - {INDEX} == _files(source) - {WEIGHTS}
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())


@pytest.mark.parametrize("config", [MIXTURE, replace(SMALL, attention_bias=True)])
def test_every_kind_of_parameter_goes_through_orbax(tmp_path, config):
    params = random_params(config, 3)
    save_hf(tmp_path / "a", params, config)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "orbax"]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "hf"]) == 0
    _same(load_hf(tmp_path / "c").params, params)


def test_casting(source, tmp_path):
    assert (
        main(["convert", str(source), str(tmp_path / "b"), "--to", "hf", "--dtype", "bfloat16"])
        == 0
    )
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    want = jax.tree.map(lambda a: a.astype("bfloat16"), load_hf(source).params)
    _same(load_hf(tmp_path / "b").params, want)


def test_scores_are_those_of_the_network(source, tmp_path):
    policy = load_hf(source)
    ids = np.random.default_rng(0).integers(0, policy.config.vocab_size, (3, 33))
    np.save(tmp_path / "ids.npy", ids)
    main(["convert", str(source), str(tmp_path / "orbax"), "--to", "orbax"])
    from model.qwen3 import bind

    model = bind(policy.config, policy.params)
    hidden, _ = model(ids, np.broadcast_to(np.arange(33), ids.shape))
    logits = np.asarray(hidden @ model.head(), np.float64)
    golden = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for folder in (source, tmp_path / "orbax"):
        out = tmp_path / f"{folder.name}.npz"
        assert (
            main(["score", str(folder), "--ids", str(tmp_path / "ids.npy"), "--out", str(out)]) == 0
        )
        found = np.load(out)
        assert found["logprobs"].dtype == np.float32 and found["argmax"].dtype == np.int32
        want = np.take_along_axis(golden[:, :-1], ids[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(found["logprobs"], want, atol=1e-5)
        np.testing.assert_array_equal(found["argmax"], logits.argmax(-1))


def test_greedy_continuations_are_the_argmax_of_their_scores(source, tmp_path):
    prompts = np.random.default_rng(1).integers(0, 300, (3, 9))
    np.save(tmp_path / "ids.npy", prompts)
    out = tmp_path / "new.npz"
    argv = ["generate", str(source), "--ids", str(tmp_path / "ids.npy"), "--out", str(out)]
    assert main([*argv, "--max-new", "20"]) == 0
    new = np.load(out)
    assert new["ids"].shape == new["logprobs"].shape == (3, 20)
    np.save(tmp_path / "all.npy", np.concatenate([prompts, new["ids"]], 1))
    scored = tmp_path / "scored.npz"
    main(["score", str(source), "--ids", str(tmp_path / "all.npy"), "--out", str(scored)])
    np.testing.assert_array_equal(np.load(scored)["argmax"][:, 8:-1], new["ids"])
    np.testing.assert_allclose(np.load(scored)["logprobs"][:, 8:], new["logprobs"], atol=1e-4)
    stop = int(new["ids"][1, 4])
    assert main([*argv, "--max-new", "20", "--stop", str(stop)]) == 0
    cut = np.load(out)["ids"][1]
    first = new["ids"][1].tolist().index(stop)
    assert cut[: first + 1].tolist() == new["ids"][1, : first + 1].tolist()
    assert (cut[first + 1 :] == -1).all()


def test_sampling_depends_on_the_seed_alone(source, tmp_path):
    np.save(tmp_path / "ids.npy", np.full((2, 4), 7))
    out = tmp_path / "new.npz"
    argv = ["generate", str(source), "--ids", str(tmp_path / "ids.npy"), "--out", str(out)]
    argv += ["--max-new", "12", "--temperature", "1.5", "--top-k", "50"]
    rows = []
    for seed in ("3", "3", "4"):
        assert main([*argv, "--seed", seed]) == 0
        rows.append(np.load(out)["ids"])
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any() and (rows[0][0] != rows[0][1]).any()


def _bad_index(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: "../x/" + WEIGHTS for n in tensors}}))


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04\x95" + bytes(5000))


def _only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _longer(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(bytes(64))


def _odd_dtype(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_bad_index, "../x/"),
        (_pickle, "pickle"),
        (_only_a_pickle, "pytorch_model.bin"),
        (_truncated, WEIGHTS),
        (_longer, WEIGHTS),
        (_odd_dtype, "model.norm.weight"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "score"])
def test_what_cannot_be_trusted_is_refused_by_name(source, tmp_path, capsys, damage, word, verb):
    folder, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(source, folder)
    (folder / MANIFEST).unlink()
    damage(folder)
    np.save(tmp_path / "ids.npy", np.zeros((1, 4), int))
    rest = {"convert": [str(out), "--to", "hf"]}.get(
        verb, ["--ids", str(tmp_path / "ids.npy"), "--out", str(out)]
    )
    assert main([verb, str(folder), *rest]) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.strip().splitlines()) == 1
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (np.zeros(3, int), "[n, t]"),
        (np.zeros((2, 3)), "integer"),
        (np.full((1, 2), 10**6), "1000000"),
        (np.full((1, 2), -1), "-1"),
        (np.zeros((0, 3), int), "no ids"),
        (None, "not an .npy"),
    ],
)
def test_ids_that_make_no_sense_are_refused(source, tmp_path, capsys, ids, word):
    path = tmp_path / "ids.npy"
    if ids is None:
        path.write_bytes(b"hello")
    else:
        np.save(path, ids)
    for verb, more in (("score", []), ("generate", ["--max-new", "3"])):
        argv = [verb, str(source), "--ids", str(path), "--out", str(tmp_path / "o.npz"), *more]
        assert main(argv) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "o.npz").exists()


def test_a_conversion_that_was_cut_off_goes_on(source, tmp_path, monkeypatch):
    """Stopped after the second shard: the same line again writes only what is missing."""
    import model.hf as hf

    argv = ["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--shard-gb", "2e-5"]
    real, written = hf.write, []

    def stops(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(hf, "write", stops)
    assert main(argv) == 130
    assert not (tmp_path / "out").exists()
    again: list[str] = []
    monkeypatch.setattr(
        hf, "write", lambda path, *rest: (again.append(path.name), real(path, *rest))[1]
    )
    assert main(argv) == 0
    assert len(again) > 1 and not set(again) & set(written)
    _same(load_hf(tmp_path / "out").params, load_hf(source).params)
    assert not list(tmp_path.glob(".out*"))
