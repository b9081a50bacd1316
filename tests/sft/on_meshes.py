"""Run by tests/sft/test_mesh.py in processes of its own: one step on many meshes and on one
device.

    on_meshes.py FOLDER {meshes,random,losses,hosts} [PORT PROCESS]

``hosts``: this is one of two processes of four devices each. Otherwise one process has eight.
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

FOLDER, WHAT = Path(sys.argv[1]), sys.argv[2]
HOSTS = 2 if WHAT == "hosts" else 1
jax.config.update("jax_num_cpu_devices", 8 // HOSTS)
if WHAT == "hosts":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", HOSTS, int(sys.argv[4]))

import optax  # noqa: E402

from model.checkpoint import Checkpoints  # noqa: E402
from model.config import Qwen3Config  # noqa: E402
from model.lora import Lora, add_adapters  # noqa: E402
from model.sharding import make_mesh  # noqa: E402
from rl.loss import LossConfig, loss_of_rows  # noqa: E402
from sft.learner import Learner, Loss  # noqa: E402
from sft.packing import Example, Rows, microbatches, pack  # noqa: E402
from tests.model.conftest import SMALL, random_params  # noqa: E402

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"slice": 2, "data": 2, "fsdp": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"slice": 2, "fsdp": 2, "tensor": 2},
    {"context": 4, "fsdp": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
]
MODEL = replace(SMALL, vocab_size=96, scan_layers=True)
ROWS, TOKENS = 8, 32  # of a microbatch


def loss(logprob, entropy, rows):
    """Something with derivatives of both."""
    value = -(rows.weight * (logprob + 0.3 * entropy)).sum()
    return value, {"entropy": (rows.weight * entropy).sum()}


LOSSES = {
    "grpo": LossConfig(aggregate="sequence", kl_coef=0.04),
    "dr-grpo": LossConfig(aggregate="constant", horizon=16),
    "dapo": LossConfig(clip_high=0.28, entropy_coef=0.01),
    "gspo": LossConfig(objective="gspo", aggregate="sequence", clip_low=0.1, clip_high=0.1),
    "cispo": LossConfig(objective="cispo", clip_low=1.0),
}


def batch(config: Qwen3Config, dense: bool) -> list[Rows]:
    """Three microbatches of packed random examples; dense: a slot for every token. Of policy
    tokens alone, near the probability of chance, where the loss is one of RL's."""
    rng = np.random.default_rng(0)
    examples = []
    for n in rng.integers(4, TOKENS + 1, 45):
        weight = rng.random(n) * (rng.random(n) < 0.7)
        if WHAT == "losses":
            weight = (weight > 0) * 1.0
        old, advantage = -np.log(config.vocab_size) + rng.normal(0, 0.3, n), rng.normal()
        examples.append(
            Example(rng.integers(0, config.vocab_size, n), weight, old, [advantage] * n)
        )
    rows = pack(examples, TOKENS, 0 if dense else TOKENS)
    return microbatches(rows.select(slice(0, 3 * ROWS - 2)), ROWS)


def updated(config: Qwen3Config, axes: dict[str, int] | None, loss: Loss = loss):
    """The state after a step of plain gradient descent at rate 1, and its metrics."""
    axes = axes or {}
    split = axes.get("context", 1) > 1
    config = replace(config, attention="context" if split else "xla")
    mesh = make_mesh(axes) if axes else None
    learner = Learner(config, optax.sgd(1.0, momentum=0.9), loss, mesh)
    base = random_params(replace(config, lora=None), 0)
    state = learner.init(add_adapters(base, config.lora, 1))
    batches = batch(config, split)
    if axes and HOSTS > 1:
        mine = slice(jax.process_index() * ROWS // HOSTS, (jax.process_index() + 1) * ROWS // HOSTS)
        batches = [rows.select(mine) for rows in batches]
    state, metrics = learner.step(state, batches)
    return state, metrics


def compare(
    name: object, config: Qwen3Config, axes: dict[str, int], want, loss: Loss = loss
) -> None:
    """Every piece that lies here, to 1e-5."""
    state, metrics = updated(config, axes, loss)
    for key, value in want[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=f"{name}: {key}")
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    for (path, leaf), whole in zip(leaves, jax.tree.leaves(want[0].params), strict=True):
        for shard in leaf.addressable_shards:
            where = f"{name}: {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(shard.data, whole[shard.index], atol=1e-5, err_msg=where)
    print(name, "agrees", flush=True)


def meshes() -> None:
    """The list; and a checkpoint of the first mesh is restored on all others."""
    want = jax.tree.map(np.asarray, updated(MODEL, None))
    checkpoints = Checkpoints(FOLDER / "checkpoints")
    state = updated(MODEL, MESHES[0])[0]
    checkpoints.save(1, state._asdict())
    kept = jax.tree.map(np.asarray, state) if HOSTS == 1 else None
    for axes in MESHES:
        compare(axes, MODEL, axes, want)
        if HOSTS > 1 and axes is not MESHES[-1]:
            continue  # restored on every mesh by one process
        split = axes.get("context", 1) > 1
        config = replace(MODEL, attention="context" if split else "xla")
        learner = Learner(config, optax.sgd(1.0, momentum=0.9), loss, make_mesh(axes))
        like = learner.init(random_params(MODEL, 1))
        restored = checkpoints.restore(1, like._asdict())  # compares the checksum of every array
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like._asdict()), strict=True):
            assert a.sharding == b.sharding, (a.sharding, b.sharding)
        if kept is not None:
            jax.tree.map(np.testing.assert_array_equal, restored, kept._asdict())
    checkpoints.close()


def random() -> None:
    """Random small models on random meshes."""
    rng = np.random.default_rng(7)
    for trial in range(6):
        tensor, context = (int(rng.choice([1, 2])) for _ in range(2))
        rest = 8 // tensor // context
        fsdp = int(rng.choice([n for n in (1, 2, 4, 8) if n <= rest]))
        axes = {"data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
        kv = tensor * int(rng.integers(1, 3))
        experts = int(rng.choice([0, 0, 4]))
        lora = Lora(rank=2, targets=("q", "o")) if rng.random() < 0.3 else None
        config = replace(
            MODEL,
            hidden_size=16 * int(rng.integers(1, 4)),
            intermediate_size=8 * int(rng.integers(2, 6)),
            num_hidden_layers=int(rng.integers(1, 4)),
            num_key_value_heads=kv,
            num_attention_heads=kv * int(rng.integers(1, 4)),
            head_dim=2 * int(rng.integers(2, 8)),
            vocab_size=2 * int(rng.integers(30, 90)),
            tie_word_embeddings=bool(rng.random() < 0.5),
            attention_bias=bool(rng.random() < 0.5),
            num_experts=experts,
            num_experts_per_tok=2 if experts else 0,
            moe_intermediate_size=8 if experts else 0,
            remat=str(rng.choice(["none", "dots", "attention", "full"])),
            scan_layers=bool(rng.random() < 0.5),
            lora=lora,
        )
        want = jax.tree.map(np.asarray, updated(config, None))
        compare((trial, axes, config), config, axes, want)


def losses() -> None:
    """Every loss of RL where rows, and where the tokens of a sequence, lie on several devices."""
    for name, config in LOSSES.items():
        rule = loss_of_rows(config)
        want = jax.tree.map(np.asarray, updated(MODEL, None, rule))
        for axes in ({"data": 4, "fsdp": 2}, {"fsdp": 2, "context": 4}):
            compare((name, axes), MODEL, axes, want, rule)


if __name__ == "__main__":
    {"random": random, "losses": losses}.get(WHAT, meshes)()
