"""Qwen3 in plain JAX with no library around it: what a careful script of a hundred lines reaches.

Shapes: B rows, T tokens, S keys, D hidden, H query heads, K key heads, hd head size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from worker import Job, Run, serve

Params = dict[str, Any]  # {"embed": [V, D], "norm": [D], "head"?: [D, V], "layers": [{...}, ...]}

# our name -> transformers' name, matrices transposed to [in, out]
_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


def load(job: Job) -> Params:
    """The checkpoint's parameters; `.T` does nothing to a norm's scale."""
    stored = {name: jnp.asarray(array) for name, array in job.tensors().items()}
    layers = [
        {ours: stored[f"model.layers.{i}.{theirs}.weight"].T for ours, theirs in _LAYER.items()}
        for i in range(job.config()["num_hidden_layers"])
    ]
    embed, norm = stored["model.embed_tokens.weight"], stored["model.norm.weight"]
    params: Params = {"embed": embed, "norm": norm, "layers": layers}
    if "lm_head.weight" in stored:
        params["head"] = stored["lm_head.weight"].T
    return params


class Model:
    """The forward pass of one config."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.hd, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.theta = config["rope_theta"]

    def norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps) * scale

    def rope(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, N, T, hd], positions [T]."""
        angle = positions[:, None] * self.theta ** (-jnp.arange(0, self.hd, 2) / self.hd)
        cos, sin, (a, b) = jnp.cos(angle), jnp.sin(angle), jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        """q [B, H, T, hd]; k, v [B, K, S, hd]; mask [T, S]. Returns [B, T, H * hd].

        A key head's queries stand below each other, so that keys are not repeated.
        """
        b, h, t, hd = q.shape
        q = q.reshape(b, self.kv, h // self.kv * t, hd)
        scores = (q @ k.swapaxes(-1, -2) * hd**-0.5).reshape(b, h, t, -1)
        p = jax.nn.softmax(jnp.where(mask, scores, -1e30))
        out = (p.reshape(b, self.kv, h // self.kv * t, -1) @ v).reshape(b, h, t, hd)
        return out.transpose(0, 2, 1, 3).reshape(b, t, h * hd)

    def layer(
        self, w: Params, x: jax.Array, start: jax.Array | int, mask: jax.Array, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] at positions start...; `cache` is (k, v) of [B, K, S, hd], or None."""
        b, t, _ = x.shape
        positions = start + jnp.arange(t, dtype=jnp.float32)
        h = self.norm(x, w["norm1"])
        q, k, v = ((h @ w[name]).reshape(b, t, -1, self.hd).transpose(0, 2, 1, 3) for name in "qkv")
        q = self.rope(self.norm(q, w["q_norm"]), positions)
        k = self.rope(self.norm(k, w["k_norm"]), positions)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice(old, new, (0, 0, start, 0))
                for old, new in zip(cache, (k, v), strict=True)
            )
        x = x + self.attention(q, k, v, mask) @ w["o"]
        h = self.norm(x, w["norm2"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], (k, v)

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        return self.norm(x, params["norm"]) @ params.get("head", params["embed"].T)

    def logprobs(self, params: Params, ids: jax.Array) -> jax.Array:
        """Of every id but the first, [B, T - 1]."""
        x, mask = params["embed"][ids], jnp.tri(ids.shape[1], dtype=bool)
        for w in params["layers"]:
            x, _ = self.layer(w, x, 0, mask)
        z = self.logits(params, x)[:, :-1]
        found = jnp.take_along_axis(z, ids[:, 1:, None], -1)[..., 0]
        return found - jax.nn.logsumexp(z, -1)

    def generate(self, params: Params, prompts: jax.Array, new: int) -> jax.Array:
        """Greedy ids [B, new]."""
        b, length = prompts.shape
        size = length + new

        def forward(ids: jax.Array, start: jax.Array | int, caches: Any) -> tuple[jax.Array, Any]:
            mask = jnp.arange(size) <= start + jnp.arange(ids.shape[1])[:, None]
            x, written = params["embed"][ids], []
            for w, cache in zip(params["layers"], caches, strict=True):
                x, cache = self.layer(w, x, start, mask, cache)
                written.append(cache)
            return jnp.argmax(self.logits(params, x[:, -1:]), -1), written

        def step(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
            ids, caches = carry
            return forward(ids, start, caches), ids[:, 0]

        empty = jnp.zeros((b, self.kv, size, self.hd))
        first = forward(prompts, 0, [(empty, empty)] * len(params["layers"]))
        return jax.lax.scan(step, first, length + jnp.arange(new))[1].T


def train(job: Job) -> Run:
    model, params, ids = Model(job.config()), load(job), jnp.asarray(job.batch())
    rule = optax.adamw(job.learning_rate, weight_decay=job.weight_decay)
    state = (params, rule.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, grads = jax.value_and_grad(lambda p: -model.logprobs(p, ids).mean())(params)
        updates, moments = rule.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def run() -> float:
        nonlocal state
        state, loss = step(state)
        return float(jax.block_until_ready((state, loss))[1])

    return run


def logprobs(job: Job) -> Run:
    model, params, ids = Model(job.config()), load(job), jnp.asarray(job.batch())
    program = jax.jit(model.logprobs)
    return lambda: np.asarray(program(params, ids))


def sample(job: Job) -> Run:
    model, params, prompts = Model(job.config()), load(job), jnp.asarray(job.prompts())
    program = jax.jit(functools.partial(model.generate, new=job.new))
    return lambda: np.asarray(program(params, prompts))


if __name__ == "__main__":
    serve({"train": train, "logprobs": logprobs, "sample": sample}, ("jax", "optax"))
