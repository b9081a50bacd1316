"""Tunix: its Qwen3, the step of its PeftTrainer, its RL's log-probabilities, its Sampler."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl.common import compute_per_token_logps
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from worker import Job, Run, serve


def _mesh() -> jax.sharding.Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=axis_types)


def _model(job: Job, mesh: jax.sharding.Mesh) -> nnx.Module:
    c = job.config()
    config = ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c["rope_theta"],  # which its attention does not read: it computes with 1e6
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(job.checkpoint, config, mesh, dtype=jnp.float32)


def train(job: Job) -> Run:
    rule = optax.adamw(job.learning_rate, weight_decay=job.weight_decay)
    mesh = _mesh()
    with mesh:  # or the optimizer's state is laid out anew by the first step, and compiled twice
        config = TrainingConfig(eval_every_n_steps=10**9)
        trainer = PeftTrainer(_model(job, mesh), rule, config)

    def model_input(ids: jax.Array) -> dict[str, jax.Array]:
        there = jnp.ones(ids.shape, bool)
        return {
            "input_tokens": ids,
            "input_mask": there,
            "positions": utils.build_positions_from_mask(there),
            "attention_mask": utils.make_causal_attn_mask(there),
        }

    trainer.with_gen_model_input_fn(model_input)
    with mesh:
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as its `train` does
    ids = jnp.asarray(job.batch())

    def run() -> float:
        with mesh:
            loss, *_ = step(ids)
        jax.block_until_ready(nnx.state(trainer.model))
        return float(loss)

    return run


def logprobs(job: Job) -> Run:
    graph, state = nnx.split(_model(job, _mesh()))
    ids = jnp.asarray(job.batch())
    # the first token is the prompt; no id is padding, and the end id is not looked at
    return lambda: np.asarray(compute_per_token_logps(graph, state, ids[:, :1], ids[:, 1:], -1, -2))


class _Ids:
    """A tokenizer whose texts are ids, and which has no special ones."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def sample(job: Job) -> Run:
    c = job.config()
    cache = CacheConfig(
        cache_size=job.prompt + job.new,
        num_layers=c["num_hidden_layers"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
    )
    sampler = Sampler(_model(job, _mesh()), _Ids(), cache)
    texts = [_Ids().decode(ids) for ids in job.prompts().tolist()]

    def run() -> np.ndarray:
        answer = sampler(texts, max_generation_steps=job.new, max_prompt_length=job.prompt)
        return np.stack(answer.tokens)

    return run


if __name__ == "__main__":
    packages = ("google-tunix", "jax", "flax")
    serve({"train": train, "logprobs": logprobs, "sample": sample}, packages)
