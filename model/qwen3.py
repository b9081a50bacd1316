"""Qwen3, dense, in Flax NNX: one forward pass for packed training, prefill and decode.

    h = h + Wo · attend(rope(norm(Wq · norm(h))), rope(norm(Wk · norm(h))), Wv · norm(h))
    h = h + Wdown · (silu(Wgate · norm(h)) * (Wup · norm(h)))

Shapes: B rows, T tokens, D hidden, H query heads, K key heads, hd head size, F intermediate,
V vocabulary, L layers, S cache length. Norms, RoPE and softmax run in float32, products in
``config.dtype``. Layers are stacked along a leading axis and looped with ``lax.scan`` (or
unrolled, ``config.scan_layers``); parameters declare logical axes, ``model/sharding.py`` maps them.

Outside a module parameters are a plain nested dict of arrays (``init``, ``bind``): what the
optimizer, the checkpoints and the snapshots hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import attend, attend_cached
from model.config import Qwen3Config

Params = dict[str, Any]  # {"embed": [V,D], "layers": {...: [L,...]}, "norm": [D], "lm_head"?: [D,V]}


class KVCache(NamedTuple):
    """Keys and values by layer, each [B, K, S, hd]; entry s holds the token at position s."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def empty_cache(config: Qwen3Config, rows: int, length: int) -> KVCache:
    """A zeroed cache for ``rows`` rows of at most ``length`` tokens."""
    shape = (rows, config.num_key_value_heads, length, config.head_dim)

    def zeros() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_hidden_layers))

    return KVCache(zeros(), zeros())


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis in float32, scaled, back in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, hd/2] float32 of position times theta^(-2i/hd)."""
    rates = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * rates
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the two halves of each head [B, T, N, hd] (https://arxiv.org/abs/2104.09864)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, f, hd = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
        deep = (2 * config.num_hidden_layers) ** -0.5  # the residual sum keeps its size with depth
        param = functools.partial(_param, config, rngs)
        self.attn_norm = param((d,), ("embed",))
        self.q = param((d, q), ("embed", "heads"), d**-0.5)
        self.k = param((d, kv), ("embed", "kv_heads"), d**-0.5)
        self.v = param((d, kv), ("embed", "kv_heads"), d**-0.5)
        self.q_norm = param((hd,), ("head_dim",))
        self.k_norm = param((hd,), ("head_dim",))
        self.o = param((q, d), ("heads", "embed"), q**-0.5 * deep)
        self.mlp_norm = param((d,), ("embed",))
        self.gate = param((d, f), ("embed", "mlp"), d**-0.5)
        self.up = param((d, f), ("embed", "mlp"), d**-0.5)
        self.down = param((f, d), ("mlp", "embed"), f**-0.5 * deep)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; ``attention`` maps q [B,T,H,hd], k, v [B,T,K,hd] to [B,T,H*hd]."""
        c, (b, t, _) = self.config, x.shape
        dot = functools.partial(_dot, dtype=jnp.dtype(c.dtype))
        h = rms_norm(x, self.attn_norm[...], c.rms_norm_eps)
        q, k, v = (dot(h, w).reshape(b, t, -1, c.head_dim) for w in (self.q, self.k, self.v))
        q = rope(rms_norm(q, self.q_norm[...], c.rms_norm_eps), *rotation)
        k = rope(rms_norm(k, self.k_norm[...], c.rms_norm_eps), *rotation)
        x = x + dot(attention(q, k, v), self.o)
        h = rms_norm(x, self.mlp_norm[...], c.rms_norm_eps)
        return x + dot(jax.nn.silu(dot(h, self.gate)) * dot(h, self.up), self.down)


class Qwen3(nnx.Module):
    """The network without its output projection, which ``model/logprobs.py`` applies in chunks."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        v, d = config.vocab_size, config.hidden_size
        self.embed = _param(config, rngs, (v, d), ("vocab", "embed"), 0.02)
        split = nnx.split_rngs(splits=config.num_hidden_layers)
        self.layers = split(nnx.vmap(lambda r: Block(config, rngs=r)))(rngs)
        self.norm = _param(config, rngs, (d,), ("embed",))
        if not config.tie_word_embeddings:
            self.lm_head = _param(config, rngs, (d, v), ("embed", "vocab"), d**-0.5)

    def head(self) -> jax.Array:
        """The output projection [D, V]: logits are ``hidden @ head()``."""
        return self.embed[...].T if self.config.tie_word_embeddings else self.lm_head[...]

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm.

        Args:
            tokens, positions: [B, T] int32. Positions count from 0 within each segment.
            segments: [B, T] int32 or None (one segment a row): packed episodes in training;
                tokens attend within their own segment only. Ignored with a cache.
            cache: with one, keys and values are written at ``positions`` and a token attends to
                entries 0..position; a position >= S writes nothing (padding), its output is
                meaningless.

        Returns (hidden [B, T, D] in ``config.dtype``, the updated cache or None).
        """
        c = self.config
        x = self.embed[...][tokens].astype(c.dtype)
        rotation = rope_tables(positions, c.head_dim, c.rope_theta)
        if cache is not None:
            x, cache = self._cached_layers(x, positions, rotation, cache)
            return rms_norm(x, self.norm[...], c.rms_norm_eps), cache

        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            block = nnx.merge(graph, state)
            return block(x, rotation, lambda q, k, v: attend(q, k, v, segments, c.attention)), None

        layer = _remat(layer, c.remat)
        if c.scan_layers:
            x, _ = jax.lax.scan(layer, x, stacked)
        else:
            for i in range(c.num_hidden_layers):
                x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], stacked))
        return rms_norm(x, self.norm[...], c.rms_norm_eps), None

    def _cached_layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """All layers with a cache, unrolled: a scan would copy each layer's cache twice a token."""
        graph, stacked = nnx.split(self.layers)
        rows = jnp.arange(x.shape[0])[:, None]
        keys, values = list(cache.k), list(cache.v)
        for i in range(self.config.num_hidden_layers):

            def attention(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i) -> jax.Array:
                keys[i] = keys[i].at[rows, :, positions].set(k, mode="drop")
                values[i] = values[i].at[rows, :, positions].set(v, mode="drop")
                return attend_cached(q, keys[i], values[i], positions)

            block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))
            x = block(x, rotation, attention)
        return x, KVCache(tuple(keys), tuple(values))


def init(config: Qwen3Config, seed: int | jax.Array = 0) -> Params:
    """Fresh parameters; matrices N(0, 1/fan_in), those that write the residual scaled by depth."""
    return nnx.to_pure_dict(nnx.state(Qwen3(config, rngs=nnx.Rngs(seed)), nnx.Param))


def abstract(config: Qwen3Config) -> Params:
    """The tree of ``init`` as jax.ShapeDtypeStruct, without computing anything."""
    return nnx.to_pure_dict(_skeleton(config)[1])


def logical_axes(config: Qwen3Config) -> Params:
    """The tree of ``init`` with a tuple of logical axis names in place of each array."""

    def axes(path: tuple[Any, ...], param: nnx.Param) -> tuple[str, ...]:
        own = param.get_metadata("axes")
        return ("layers", *own) if path[0] == "layers" else own

    return nnx.to_pure_dict(nnx.map_state(axes, _skeleton(config)[1]))


def bind(config: Qwen3Config, params: Params) -> Qwen3:
    """The module that holds these arrays; costs nothing, meant to be called inside jit."""
    graph, state = _skeleton(config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a fresh container, the skeleton is shared
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@functools.lru_cache(maxsize=8)
def _skeleton(config: Qwen3Config) -> tuple[Any, Any]:
    """Graph definition and abstract state of a config's module."""
    return nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))


def _param(
    config: Qwen3Config,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float | None = None,
) -> nnx.Param:
    """A parameter with its logical axes: N(0, std^2), or ones where std is None."""
    if std is None:
        return nnx.Param(jnp.ones(shape, config.param_dtype), axes=axes)
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(config.param_dtype), axes=axes)


def _dot(x: jax.Array, w: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    return x @ w[...].astype(dtype)


def _remat(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """What the backward pass recomputes: nothing, all but the matmuls, or the whole layer."""
    if policy == "none":
        return layer
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)
