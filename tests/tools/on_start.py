"""Run by tests/tools/test_start.py in a process of its own with eight devices: what lies on each
while a run with a mesh reads its policy, trains it, and writes and reads the result.

    on_start.py FOLDER
"""

import asyncio
import contextlib
import functools
import os
import sys
from pathlib import Path

import jax
import numpy as np

from configs.schema import from_dict
from model import blocks
from model.config import Qwen3Config
from model.hf import WEIGHTS, save_hf
from model.qwen3 import abstract, init
from model.sharding import make_mesh, param_shardings
from model.share import whole
from model.tokenizer import Tokenizer
from sft.trajectory import POLICY, Trajectory
from tests.tools.hosts import CONFIG, ROOT, prepare
from tools import pipeline

FOLDER = Path(sys.argv[1])
os.environ["REMEND_CACHE"] = str(FOLDER / "cache")
os.chdir(FOLDER)
MODEL = Qwen3Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    tie_word_embeddings=True,
)
MESH = {"fsdp": 4, "tensor": 2}
SMALL = 1 << 19  # bytes a device may hold beside its share: norms, of a layer its part, rows


def on_devices() -> int:
    """Bytes of arrays on the device that holds most."""
    held: dict[jax.Device, dict[int, int]] = {device: {} for device in jax.devices()}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:  # they share their memory with the array
            held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return max(sum(buffers.values()) for buffers in held.values())


def start(policy: Path) -> pipeline.Pipeline:
    """A run that has read its policy, and the most that lay on a device while it did."""
    peaks = [0]
    read = functools.partial(
        pipeline.load_policy, progress=lambda *_: peaks.append(max(peaks[-1], on_devices()))
    )
    small = {"row_tokens": 512, "row_targets": 0, "batch_rows": 4, "microbatch_rows": 4}
    config = from_dict(
        pipeline.RunConfig,
        CONFIG | {"policy": str(policy), "mesh": MESH, "sft": small | {"epochs": 1}},
        "this test",
    )
    with_peaks, pipeline.load_policy = pipeline.load_policy, read
    run = pipeline.Pipeline(config, FOLDER / "run", 0)
    pipeline.load_policy = with_peaks
    print("start", max(peaks[-1], on_devices()), flush=True)
    return run


def main() -> None:
    prepare(FOLDER)
    size = sum(np.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(abstract(MODEL)))
    share = size // 8
    print("share", int(share), "small", SMALL)
    written = jax.tree.map(np.array, init(MODEL, 0))
    written["embed"][3] = -0.0  # a sum with zeros would make it 0.0
    save_hf(FOLDER / "big", written, MODEL, Tokenizer.load(ROOT / "model" / "policies" / "tiny"))
    run = start(FOLDER / "big")

    # the same bytes from every layout, through blocks that do not come out even
    blocks.blocks.__kwdefaults__["limit"] = 300_000
    same = (FOLDER / "big" / WEIGHTS).read_bytes()
    for axes in (MESH, {"data": 2, "context": 2, "fsdp": 2}):
        spread = jax.device_put(written, param_shardings(MODEL, make_mesh(axes)))
        save_hf(FOLDER / "copy", spread, MODEL)
        assert (FOLDER / "copy" / WEIGHTS).read_bytes() == same, axes
    del spread
    print("exports are equal")

    training = [0]

    @contextlib.contextmanager
    def watched(label: str):
        yield lambda *_: training.append(on_devices())

    pipeline.progress = watched
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, 300).tolist()
    verdict = {"verdict": "pass"}
    taught = [
        Trajectory("t", "p", "o", "train", "teacher", i, -1, "", verdict=verdict) for i in range(8)
    ]
    for trajectory in taught:
        trajectory.add(ids, POLICY)
    tuned = asyncio.run(run.sft(taught))
    print("training", max(training))
    print("result", on_devices())
    got = jax.tree.map(np.asarray, whole(tuned))
    assert not np.array_equal(got["embed"], written["embed"])
    assert all(not a.sharding.is_fully_replicated for a in (tuned["embed"], tuned["layers"]["q"]))


if __name__ == "__main__":
    main()
