"""What reading and writing a checkpoint hold beside the model, measured in processes apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys
from pathlib import Path
import jax, numpy as np
from model.config import Qwen3Config
from model.hf import save_hf
from model.qwen3 import abstract
config = Qwen3Config(
    vocab_size=40_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
)
params = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), abstract(config))
save_hf(Path(sys.argv[1]), params, config, shard_bytes=50_000_000)
"""

PEAK = """
import resource, sys
from pathlib import Path
import jax
from model.hf import load_hf, save_hf
jax.block_until_ready(jax.numpy.zeros(3) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
policy = load_hf(Path(sys.argv[1]), param_dtype=sys.argv[2])
leaves = jax.tree.leaves(policy.params)
model = sum(leaf.nbytes for leaf in leaves)
print(peak() - before - model, policy.params["embed"].nbytes, model)
before = peak()
save_hf(Path(sys.argv[1] + "-copy"), policy.params, policy.config, shard_bytes=50_000_000)
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_the_model_there_is_at_most_the_largest_tensor(tmp_path: Path, dtype: str):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    folder = str(tmp_path / "ckpt")
    subprocess.run([sys.executable, "-c", WRITE, folder], env=env, check=True, timeout=240)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, dtype],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    beside, largest, model, writing = map(int, done.stdout.split())
    assert model > 2 * largest
    assert beside <= 1.2 * largest
    assert writing <= 1.2 * largest
