"""MaxText: its Qwen3 decoder, its train step, its MaxEngine (prefill, insert, generate)."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# before MaxText is imported: without these it looks for Google Cloud
os.environ |= {"DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"}

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import optax
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.common.train_state_nnx import TrainStateNNX
from maxtext.configs import pyconfig
from maxtext.inference.maxengine import maxengine
from maxtext.trainers.pre_train.train import train_step
from maxtext.utils import maxtext_utils, model_creation_utils
from worker import Job, Run, serve


def _config(job: Job, rows: int, tokens: int) -> Any:
    """MaxText's config for batches of `rows` rows of at most `tokens` tokens."""
    c = job.config()
    tied = c["tie_word_embeddings"]
    flags = {
        "run_name": "bench",
        "base_output_directory": tempfile.gettempdir(),
        "hardware": "cpu" if job.device == "cpu" else "gpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_goodput_recording": False,
        "log_config": False,
        "dataset_type": "synthetic",
        # the network
        "model_name": "default",
        "decoder_block": "qwen3",
        "vocab_size": c["vocab_size"],
        "base_emb_dim": c["hidden_size"],
        "base_mlp_dim": c["intermediate_size"],
        "base_num_decoder_layers": c["num_hidden_layers"],
        "base_num_query_heads": c["num_attention_heads"],
        "base_num_kv_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"],
        "mlp_activations": '["silu","linear"]',
        "normalization_layer_epsilon": c["rms_norm_eps"],
        "rope_max_timescale": int(c["rope_theta"]),
        "use_qk_norm": True,
        "logits_via_embedding": tied,
        "normalize_embedding_logits": False,  # its default divides a tied head's logits
        # the same arithmetic as everyone, and nothing computed twice
        "dtype": "float32",
        "weight_dtype": "float32",
        "matmul_precision": "highest",
        "attention": "dot_product",
        "scan_layers": False,
        "remat_policy": "none",
        "enable_dropout": False,
        "gradient_clipping_threshold": 0.0,
        # the batch
        "per_device_batch_size": rows,
        "max_target_length": tokens,
        "max_prefill_predict_length": job.prompt,
        "decode_sampling_strategy": "greedy",
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return pyconfig.initialize(["bench", str(base), *(f"{k}={v}" for k, v in flags.items())])


def _weights(job: Job) -> dict[str, np.ndarray]:
    """The checkpoint by MaxText's paths and in its shapes: heads apart, matrices [in, out]."""
    c, stored = job.config(), job.tensors()
    d, hd = c["hidden_size"], c["head_dim"]
    out = {
        "token_embedder.embedding": stored["model.embed_tokens.weight"],
        "decoder.decoder_norm.scale": stored["model.norm.weight"],
    }
    if "lm_head.weight" in stored:
        out["decoder.logits_dense.kernel"] = stored["lm_head.weight"].T
    names = {
        "pre_self_attention_layer_norm.scale": "input_layernorm",
        "post_self_attention_layer_norm.scale": "post_attention_layernorm",
        "self_attention.query_norm.scale": "self_attn.q_norm",
        "self_attention.key_norm.scale": "self_attn.k_norm",
        "self_attention.query.kernel": "self_attn.q_proj",
        "self_attention.key.kernel": "self_attn.k_proj",
        "self_attention.value.kernel": "self_attn.v_proj",
        "self_attention.out.kernel": "self_attn.o_proj",
        "mlp.wi_0.kernel": "mlp.gate_proj",
        "mlp.wi_1.kernel": "mlp.up_proj",
        "mlp.wo.kernel": "mlp.down_proj",
    }
    for layer in range(c["num_hidden_layers"]):
        for ours, theirs in names.items():
            value = stored[f"model.layers.{layer}.{theirs}.weight"].T
            if theirs.endswith(("q_proj", "k_proj", "v_proj")):
                value = value.reshape(d, -1, hd)
            elif theirs.endswith("o_proj"):
                value = value.reshape(-1, hd, d)
            out[f"decoder.layers_{layer}.{ours}"] = value
    return out


def _load(job: Job, config: Any) -> tuple[nnx.Module, Any]:
    """The model with the checkpoint's weights, and its mesh."""
    mesh = maxtext_utils.get_mesh_from_config(config)
    model = model_creation_utils.create_model(
        config, mesh, rngs=nnx.Rngs(params=0, dropout=1, aqt=2)
    )
    weights, state = _weights(job), nnx.state(model, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        value = weights.pop(".".join(map(str, path)))
        if value.shape != variable.get_value().shape:
            raise ValueError(f"{path}: {value.shape} is not {variable.get_value().shape}")
        variable.set_value(jnp.asarray(value))
    if weights:
        raise ValueError(f"MaxText's model has no place for {sorted(weights)[0]}")
    nnx.update(model, state)
    return model, mesh


@contextmanager
def _inside(config: Any, mesh: Any) -> Iterator[None]:
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        yield


def train(job: Job) -> Run:
    config = _config(job, job.rows, job.tokens)
    model, mesh = _load(job, config)
    rule = optax.adamw(job.learning_rate, weight_decay=job.weight_decay)
    graph, state = nnx.split(TrainStateNNX(model, nnx.Optimizer(model, rule, wrt=nnx.Param)))
    # as it will come back, or the second step compiles again
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    program = jax.jit(functools.partial(train_step, graph, config, None, None), donate_argnums=0)
    ids = job.batch()
    there = np.ones_like(ids)
    scored = there.copy()
    scored[:, -1] = 0  # nothing follows the last token
    positions = np.broadcast_to(np.arange(job.tokens, dtype=np.int32), ids.shape)
    data = {
        "inputs": ids,
        "inputs_position": positions,
        "inputs_segmentation": there,
        "targets": np.roll(ids, -1, axis=1),
        "targets_position": positions,
        "targets_segmentation": scored,
    }
    data = {name: jnp.asarray(value) for name, value in data.items()}

    def run() -> float:
        nonlocal state
        with _inside(config, mesh):
            state, metrics = program(state, dict(data))
            jax.block_until_ready(state)
        return float(metrics["scalar"]["learning/loss"])

    return run


def logprobs(job: Job) -> Run:
    config = _config(job, job.rows, job.tokens)
    model, mesh = _load(job, config)
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    ids = jnp.asarray(job.batch())

    @jax.jit
    def program(params: Any, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, *rest, copy=True)
        positions = jnp.broadcast_to(jnp.arange(job.tokens), ids.shape)
        segments = jnp.ones_like(ids)
        z = model(ids, positions, decoder_segment_ids=segments, enable_dropout=False)[:, :-1]
        found = jnp.take_along_axis(z, ids[:, 1:, None], -1)[..., 0]
        return found - jax.nn.logsumexp(z, -1)

    def run() -> np.ndarray:
        with _inside(config, mesh):
            return np.asarray(program(params, ids))

    return run


def _let_results_leave_jit() -> None:
    """Outside Google Cloud a stub stands in for JetStream's ResultTokens, and is no pytree."""
    kind = maxengine.engine_api.ResultTokens
    if not getattr(maxengine.engine_api, "_IS_STUB", False):
        return
    static = ("tokens_idx", "valid_idx", "length_idx", "samples_per_slot")

    def flatten(result: Any) -> tuple[Any, Any]:
        return (result.data, result.log_prob), tuple(getattr(result, name) for name in static)

    def unflatten(rest: Any, arrays: Any) -> Any:
        return kind(data=arrays[0], log_prob=arrays[1], **dict(zip(static, rest, strict=True)))

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)


def sample(job: Job) -> Run:
    _let_results_leave_jit()
    config = _config(job, job.slots, job.prompt + job.new)
    model, _ = _load(job, config)
    engine = maxengine.MaxEngine(config)
    params = engine.load_params(params=nnx.state(model, nnx.Param))
    prompts, key = jnp.asarray(job.prompts()), jax.random.key(0)

    def run() -> np.ndarray:
        state = engine.init_decode_state()
        firsts = []
        for slot, prompt in enumerate(prompts):
            prefix, first = engine.prefill(
                params=params, padded_tokens=prompt, true_length=job.prompt, rng=key, slot=slot
            )
            state = engine.insert(prefix, state, slot=slot)
            firsts.append(first.data[0, 0])
        columns = [jnp.stack(firsts)]
        for _ in range(job.new - 1):
            state, result = engine.generate(params, state, rng=key)
            columns.append(result.data[:, 0])
        return np.stack(jax.device_get(columns), axis=1)

    return run


if __name__ == "__main__":
    packages = ("maxtext", "jax", "flax")
    serve({"train": train, "logprobs": logprobs, "sample": sample}, packages)
