"""EasyDeL: `from_pretrained`, the step of its Trainer, and the `generate` of its models."""

from __future__ import annotations

from typing import Any

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
import optax
from easydel.trainers.trainer._fn import training_step
from jax.sharding import PartitionSpec
from transformers import GenerationConfig
from worker import Job, Run, serve


def _model(job: Job) -> Any:
    """The checkpoint in float32: its attention computes in bfloat16 unless told otherwise.

    RoPE's frequencies are rounded to bfloat16 all the same, and nothing turns that off.
    """
    return ed.AutoEasyDeLModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        sharding_axis_dims=(1, 1, 1, 1, 1),
        auto_shard_model=True,
        from_torch=True,
        config_kwargs=ed.EasyDeLBaseConfigDict(
            attn_mechanism=ed.AttentionMechanisms.SDPA,
            attn_dtype=jnp.float32,
            attn_softmax_dtype=jnp.float32,
            kvdtype=jnp.float32,
            gradient_checkpointing=ed.EasyDeLGradientCheckPointers.NONE,
        ),
    )


def train(job: Job) -> Run:
    rule = optax.adamw(job.learning_rate, weight_decay=job.weight_decay)
    state = ed.EasyDeLState.create(model=_model(job), tx=rule, init_opt_state=True)
    ids = jnp.asarray(job.batch())
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids}
    shardings = state.shardings
    program = jax.jit(
        lambda state, batch: training_step(state, batch, partition_spec=PartitionSpec()),
        donate_argnums=0,
        in_shardings=(shardings, None),
        out_shardings=(shardings, None),
    )

    def run() -> float:
        nonlocal state
        with state.model.mesh:
            state, metrics = program(state, batch)
            jax.block_until_ready(state)
        return float(metrics.loss)

    return run


def logprobs(job: Job) -> Run:
    model, ids = _model(job), jnp.asarray(job.batch())
    graph, params, rest = model.split_module()

    @jax.jit
    def program(params: Any, ids: jax.Array) -> jax.Array:
        merged = model.merge_module(graph, params, rest)
        z = merged(input_ids=ids, attention_mask=jnp.ones_like(ids)).logits[:, :-1]
        found = jnp.take_along_axis(z, ids[:, 1:, None], -1)[..., 0]
        return found - jax.nn.logsumexp(z, -1)

    def run() -> np.ndarray:
        with model.mesh:
            return np.asarray(program(params, ids))

    return run


def sample(job: Job) -> Run:
    model, prompts = _model(job), jnp.asarray(job.prompts())
    graph, params, rest = model.split_module()
    greedy = GenerationConfig(
        max_new_tokens=job.new,
        do_sample=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=job.config()["vocab_size"],  # an id that never comes
    )

    @jax.jit  # called bare, it traces and compiles its loop anew every time
    def program(params: Any, ids: jax.Array) -> jax.Array:
        merged = model.merge_module(graph, params, rest)
        out = merged.generate(ids, greedy, attention_mask=jnp.ones_like(ids))
        return out.sequences[:, job.prompt :]

    def run() -> np.ndarray:
        with model.mesh:
            return np.asarray(program(params, prompts))

    return run


if __name__ == "__main__":
    packages = ("easydel", "jax", "flax")
    serve({"train": train, "logprobs": logprobs, "sample": sample}, packages)
