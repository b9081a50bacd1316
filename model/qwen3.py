"""Qwen3 in Flax NNX: one forward pass for packed training, prefill and decode.

    h = h + Wo · attend(rope(norm(Wq · norm(h))), rope(norm(Wk · norm(h))), Wv · norm(h))
    h = h + Wdown · (silu(Wgate · norm(h)) * (Wup · norm(h)))      or model/moe.py's mixture of such

Shapes: B rows, T tokens, D hidden, H query heads, K key heads, hd head size, F intermediate,
V vocabulary, L layers, S cache length. Norms, RoPE and softmax run in float32, products in
``config.dtype``. Layers are stacked along a leading axis and looped with ``lax.scan`` (or
unrolled, ``config.scan_layers``); parameters declare logical axes, ``model/sharding.py`` maps them.

On a mesh all of this is one device's part (``model/parallel.py``). Between the matrix products a
device holds its own tokens of its own rows; the tensor group's tokens are gathered before the
products that it shares and their parts summed and scattered after them. A matrix is gathered where
it is used, in ``config.dtype``, and again in the backward pass.

Outside a module parameters are a plain nested dict of arrays (``init``, ``bind``): what the
optimizer, the checkpoints and the snapshots hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import SAVED, attend, attend_cached
from model.config import Qwen3Config
from model.moe import Experts, mixture
from model.parallel import TENSOR, WEIGHTS, count, exchange, gather, here, index, own, scatter_sum
from model.rope import rope, rope_tables

Params = dict[
    str, Any
]  # {"embed": [V,D], "layers": {...: [L,...]}, "norm": [D], "lm_head"?: [D,V]}


class KVCache(NamedTuple):
    """Keys and values by layer and block of positions, R rows.

    Entry s of block i holds the token at position ``i * block + s``. Keys are stored transposed:
    the product with one query per row then reads them in order. Blocks are arrays of their own so
    that attention can skip the ones nobody has reached without copying the others.
    """

    k: tuple[tuple[jax.Array, ...], ...]  # [layer][block] of [R, K, hd, block]
    v: tuple[tuple[jax.Array, ...], ...]  # [layer][block] of [R, K, block, hd]

    @property
    def block(self) -> int:
        """Positions of a row in each block."""
        return self.v[0][0].shape[2]

    @property
    def length(self) -> int:
        """Positions a row can hold."""
        return len(self.v[0]) * self.block


def empty_cache(config: Qwen3Config, rows: int, length: int, block: int = 128) -> KVCache:
    """A zeroed cache for ``rows`` rows of ``length`` tokens, rounded up to whole blocks."""
    layers, blocks = range(config.num_hidden_layers), range(-(-length // block))
    kv, hd = config.num_key_value_heads, config.head_dim
    return KVCache(
        k=tuple(
            tuple(jnp.zeros((rows, kv, hd, block), config.dtype) for _ in blocks) for _ in layers
        ),
        v=tuple(
            tuple(jnp.zeros((rows, kv, block, hd), config.dtype) for _ in blocks) for _ in layers
        ),
    )


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis in float32, scaled, back in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, hd = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
        param = functools.partial(_param, config, rngs)
        self.attn_norm = param((d,), ("embed",))
        self.q = param((d, q), ("embed", "heads"), d**-0.5)
        self.k = param((d, kv), ("embed", "kv_heads"), d**-0.5)
        self.v = param((d, kv), ("embed", "kv_heads"), d**-0.5)
        self.q_norm = param((hd,), ("head_dim",))
        self.k_norm = param((hd,), ("head_dim",))
        self.o = param((q, d), ("heads", "embed"), 0.0)
        self.mlp_norm = param((d,), ("embed",))
        if config.attention_bias:
            self.q_bias = param((q,), ("heads",), 0.0)
            self.k_bias = param((kv,), ("kv_heads",), 0.0)
            self.v_bias = param((kv,), ("kv_heads",), 0.0)
            self.o_bias = param((d,), ("embed",), 0.0)
        if config.num_experts:
            e, f = config.num_experts, config.moe_intermediate_size
            self.router = param((d, e), ("embed", "experts"), d**-0.5)
            self.gate = param((e, d, f), ("experts", "embed", "mlp"), d**-0.5)
            self.up = param((e, d, f), ("experts", "embed", "mlp"), d**-0.5)
            self.down = param((e, f, d), ("experts", "mlp", "embed"), 0.0)
        else:
            f = config.intermediate_size
            self.gate = param((d, f), ("embed", "mlp"), d**-0.5)
            self.up = param((d, f), ("embed", "mlp"), d**-0.5)
            self.down = param((f, d), ("mlp", "embed"), 0.0)
        for name in config.lora.targets if config.lora else ():
            self._add_adapter(name, rngs)

    def _add_adapter(self, name: str, rngs: nnx.Rngs) -> None:
        """A [in, rank] and B [rank, out] beside a matrix, float32 since they are trained.

        B starts at zero, so at no change.
        """
        assert self.config.lora is not None
        matrix, rank = getattr(self, name), self.config.lora.rank
        (rows, columns), (row_axis, column_axis) = matrix.shape, matrix.get_metadata("axes")
        exact = replace(self.config, param_dtype="float32")
        param = functools.partial(_param, exact, rngs)
        setattr(self, f"{name}_lora_a", param((rows, rank), (row_axis, "rank"), rows**-0.5))
        setattr(self, f"{name}_lora_b", param((rank, columns), ("rank", column_axis), 0.0))

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """x [B, t, D] to the same; ``attention`` takes q [B,T,H,hd], k and v [B,T,K,hd].

        t are this device's tokens, T those of its tensor group, H and K this device's heads.
        """
        c = self.config
        h = gather(rms_norm(x, self.attn_norm[...], c.rms_norm_eps), TENSOR, 1)
        b, t, _ = h.shape
        q, k, v = (self._project(h, name).reshape(b, t, -1, c.head_dim) for name in "qkv")
        q = rope(rms_norm(q, self.q_norm[...], c.rms_norm_eps), *rotation)
        k = rope(rms_norm(k, self.k_norm[...], c.rms_norm_eps), *rotation)
        x = x + self._join(attention(q, k, v), "o")
        h = gather(rms_norm(x, self.mlp_norm[...], c.rms_norm_eps), TENSOR, 1)
        if c.num_experts:
            experts = Experts(*(self._weight(name, h.dtype) for name in Experts._fields))
            h = mixture(h, experts, c.num_experts_per_tok, c.norm_topk_prob)
            return x + scatter_sum(h, TENSOR, 1)
        h = jax.nn.silu(self._project(h, "gate")) * self._project(h, "up")
        return x + self._join(h, "down")

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        """x times the matrix called ``name``, with its bias and its adapter where there are any."""
        y = checkpoint_name(self._product(x, name), PRODUCT)
        if hasattr(self, f"{name}_bias"):
            y = y + getattr(self, f"{name}_bias")[...].astype(y.dtype)
        return y

    def _join(self, x: jax.Array, name: str) -> jax.Array:
        """The same for a matrix whose rows are split: the tensor group's sum, for own tokens."""
        y = checkpoint_name(scatter_sum(self._product(x, name), TENSOR, 1), PRODUCT)
        if hasattr(self, f"{name}_bias"):
            y = y + getattr(self, f"{name}_bias")[...].astype(y.dtype)
        return y

    def _product(self, x: jax.Array, name: str) -> jax.Array:
        y = dense(x, self._weight(name, x.dtype))
        if self.config.lora and name in self.config.lora.targets:
            low = dense(x, self._weight(f"{name}_lora_a", x.dtype))
            high = dense(low, self._weight(f"{name}_lora_b", x.dtype))
            y = y + high * self.config.lora.scale
        return y

    def _weight(self, name: str, dtype: Any) -> jax.Array:
        """A matrix as the products take it: whole along ``embed``."""
        param = getattr(self, name)
        axes = param.get_metadata("axes")
        if not here(WEIGHTS) or "embed" not in axes:
            return param[...]
        whole = gather(param[...].astype(dtype), WEIGHTS, axes.index("embed"))
        return checkpoint_name(whole, GATHERED)


# What remat policies call by name.
GATHERED = "gathered"  # a weight made whole: never kept for the backward pass
LAYER_INPUT = "layer_input"
PRODUCT = "product"  # of activations and a matrix, of the tensor group's together where summed


class Qwen3(nnx.Module):
    """The network without its output projection, which ``model/logprobs.py`` applies in chunks."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, stacked: bool = True) -> None:
        self.config = config
        v, d, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
        self.embed = _param(config, rngs, (v, d), ("vocab", "embed"), d**-0.5)
        self.layers: Any  # one Block of stacked parameters, or a list of Blocks
        if stacked:
            split = nnx.split_rngs(splits=layers)
            self.layers = split(nnx.vmap(lambda r: Block(config, rngs=r)))(rngs)
        else:
            self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(layers)])
        self.norm = _param(config, rngs, (d,), ("embed",))
        if not config.tie_word_embeddings:
            self.lm_head = _param(config, rngs, (d, v), ("embed", "vocab"), d**-0.5)
        if config.value_head:
            self.value = _param(config, rngs, (d,), ("embed",), 0.0)

    def values(self, hidden: jax.Array) -> jax.Array:
        """A critic's value [..., float32] of each hidden state [..., D].

        Each device of a tensor group computes it whole and takes an equal part of its derivative,
        which is then summed over the group like that of the vocabulary head.
        """
        full = hidden.astype(jnp.float32) @ self.value[...].astype(jnp.float32)
        fixed = jax.lax.stop_gradient(full)
        return fixed + (full - fixed) / count(TENSOR)

    def head(self) -> jax.Array:
        """The output projection [D, V]: logits are ``hidden @ head()``."""
        return self.embed[...].T if self.config.tie_word_embeddings else self.lm_head[...]

    def _lookup(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [B, t, D] of this device's tokens [B, t], in ``config.dtype``.

        On a mesh the ids travel, not the table: each device looks up its part, of the vocabulary
        and of the channels, for all who share the table, and sends every one its own.
        """
        table, dtype = self.embed[...], self.config.dtype
        if not here((*WEIGHTS, TENSOR)):
            return table[tokens].astype(dtype)
        ids = gather(gather(tokens[None, None], TENSOR, 1), WEIGHTS, 0)  # [weights, tensor, B, t]
        ids = ids - index(TENSOR) * table.shape[0]
        inside = (ids >= 0) & (ids < table.shape[0])
        part = jnp.where(inside[..., None], table[jnp.where(inside, ids, 0)].astype(dtype), 0)
        part = scatter_sum(part, TENSOR, 1)[:, 0]  # [weights, B, t, D / weights]
        return exchange(part, WEIGHTS, 0, 3)[0]

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm.

        Args:
            tokens, positions: [B, T] int32. Positions count from 0 within each segment.
            segments: [B, T] int32 or None (one segment a row): packed episodes in training;
                tokens attend within their own segment only. Not used with a cache.
            cache: with one, keys and values are written at ``positions`` and a token attends to
                entries 0..position; a position >= cache.length writes nothing (padding), and its
                output is meaningless.
            rows: [B] int32, the cache row of each row; None: row i of the cache is row i.

        On a mesh B and T are this device's rows and its part of ``context``; no cache.

        Returns (hidden [B, T, D] in ``config.dtype``, the updated cache or None).
        """
        c = self.config
        x = self._lookup(own(tokens, TENSOR, 1))
        rotation = rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        if cache is None:
            x = self._layers(x, rotation, segments)
        else:
            x, cache = self._cached_layers(x, rotation, positions, cache, rows)
        return gather(rms_norm(x, self.norm[...], c.rms_norm_eps), TENSOR, 1), cache

    def _layers(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], segments: jax.Array | None
    ) -> jax.Array:
        c = self.config
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            block = nnx.merge(graph, state)
            x = checkpoint_name(x, LAYER_INPUT)
            return block(x, rotation, lambda q, k, v: attend(q, k, v, segments, c.attention)), None

        layer = _remat(layer, c.remat)
        if c.scan_layers:
            return jax.lax.scan(layer, x, stacked)[0]
        for i in range(c.num_hidden_layers):
            x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], stacked))
        return x

    def _cached_layers(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        cache: KVCache,
        rows: jax.Array | None,
    ) -> tuple[jax.Array, KVCache]:
        """All layers, unrolled: a scan would copy every layer's cache twice per token."""
        block = cache.v[0][0].shape[2]
        used = jnp.max(jnp.where(positions < cache.length, positions, 0)) // block + 1
        at = jnp.arange(x.shape[0]) if rows is None else rows
        keys: list[list[jax.Array]] = []
        values: list[list[jax.Array]] = []

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            for i in range(len(cache.k[0])):
                inside = (positions >= i * block) & (positions < (i + 1) * block)
                to = jnp.where(inside, positions - i * block, block)  # `block` is dropped
                keys[-1][i] = keys[-1][i].at[at[:, None], :, :, to].set(k, mode="drop")
                values[-1][i] = values[-1][i].at[at[:, None], :, to].set(v, mode="drop")
            return attend_cached(q, keys[-1], values[-1], positions, used, rows)

        for layer, k, v in zip(self._blocks(), cache.k, cache.v, strict=True):
            keys.append(list(k))
            values.append(list(v))
            x = layer(x, rotation, attention)
        return x, KVCache(tuple(map(tuple, keys)), tuple(map(tuple, values)))

    def _blocks(self) -> Iterator[Block]:
        """The layers one by one."""
        if isinstance(self.layers, nnx.List):
            yield from self.layers
            return
        graph, stacked = nnx.split(self.layers)
        for i in range(self.config.num_hidden_layers):
            yield nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))


def init(config: Qwen3Config, seed: int | jax.Array = 0) -> Params:
    """Fresh parameters: matrices N(0, 1/fan_in), those that write the residual stream zero.

    Every block then starts as the identity and the stream carries the token itself, which lets a
    small model learn to copy early.
    """
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
    """The module that holds these arrays; costs nothing, meant to be called inside jit.

    ``params["layers"]`` is stacked as from ``init``, or a tuple by layer as from ``unstack``.
    """
    graph, state = _skeleton(config, stacked=isinstance(params["layers"], dict))
    state = jax.tree.map(lambda leaf: leaf, state)  # a fresh container, the skeleton is shared
    if not isinstance(params["layers"], dict):
        params = params | {"layers": dict(enumerate(params["layers"]))}
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def unstack(params: Params) -> Params:
    """The same parameters with layers apart: decoding then copies no weights out of the stack."""
    layers = params["layers"]
    count = len(next(iter(layers.values())))
    return params | {"layers": tuple({n: a[i] for n, a in layers.items()} for i in range(count))}


@functools.lru_cache(maxsize=8)
def _skeleton(config: Qwen3Config, stacked: bool = True) -> tuple[Any, Any]:
    """Graph definition and abstract state of a config's module."""
    return nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0), stacked=stacked)))


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


@jax.custom_vjp
def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] times w [D, F] in x's dtype.

    With a gradient of its own, because the one JAX derives computes dW transposed and XLA:CPU then
    runs everything before it in a transposed layout, at half the speed. dW is summed in w's dtype.
    """
    return x @ w.astype(x.dtype)


def _dense_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense(x, w), (x, w)


def _dense_backward(
    saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_w = jax.lax.dot_general(
        rows, d_rows, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype
    )
    return d_out @ w.T.astype(x.dtype), d_w


dense.defvjp(_dense_forward, _dense_backward)


def _remat(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """What is kept of a layer for the backward pass; the rest of it is computed again.

    none: everything, but for weights gathered from other devices
    dots: the results of products with matrices (of a mixture's experts none)
    attention: what attention needs to be differentiated
    full: the layer's input alone
    offload: the same, in the host's memory
    """
    keep = jax.checkpoint_policies
    if policy == "none":
        if not here(WEIGHTS):
            return layer
        saved: Any = keep.save_anything_except_these_names(GATHERED)
    elif policy == "dots":
        saved = keep.save_only_these_names(PRODUCT)
    elif policy == "attention":
        saved = keep.save_only_these_names(*SAVED)
    elif policy == "offload":
        saved = keep.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        saved = None
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)
