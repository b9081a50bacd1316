"""One network however it is run: packed, looped, unrolled, cached, sharded or none of these."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import QUERY_BLOCK
from model.logprobs import token_logprobs
from model.qwen3 import abstract, bind, empty_cache, init, logical_axes, unstack

LENGTH = QUERY_BLOCK + 17  # two query blocks, one of them ragged


def _ids(config, rows: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)), jnp.int32
    )


def _positions(rows: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, ids, positions, segments):
    return bind(config, params)(ids, positions, segments)[0]


def _hidden(config, params, ids):
    return _forward(config, params, ids, _positions(*ids.shape), None)


def test_packed_equals_unpacked(small, small_params):
    """Three episodes in one row, with padding, against each alone."""
    lengths = [150, 20, 90]
    episodes = [_ids(small, 1, n, seed=n) for n in lengths]
    pad = LENGTH - sum(lengths)
    ids = jnp.concatenate([*episodes, jnp.zeros((1, pad), jnp.int32)], 1)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [*lengths, pad])[None])
    positions = jnp.concatenate([_positions(1, n) for n in (*lengths, pad)], 1)
    packed = _forward(small, small_params, ids, positions, segments)
    assert np.isfinite(packed).all()
    start = 0
    for episode, n in zip(episodes, lengths, strict=True):
        alone = _hidden(small, small_params, episode)
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


def test_the_future_is_not_seen(small, small_params):
    ids = _ids(small, 2, LENGTH)
    changed = ids.at[:, 200:].set((ids[:, 200:] + 1) % small.vocab_size)
    a, b = (_hidden(small, small_params, x) for x in (ids, changed))
    np.testing.assert_allclose(a[:, :200], b[:, :200], atol=1e-6)
    assert np.abs(a[:, 200:] - b[:, 200:]).max() > 1e-2


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (True, "full"), (False, "dots")])
def test_scan_and_remat_change_nothing(small, small_params, scan, remat):
    ids = _ids(small, 1, 160)

    def loss(params, config):
        model = bind(config, params)
        hidden, _ = model(ids, _positions(1, 160))
        flat = hidden[:, :-1].reshape(-1, config.hidden_size)
        return token_logprobs(flat, model.head(), ids[:, 1:].reshape(-1))[0].mean()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = run(small_params, replace(small, scan_layers=scan, remat=remat))
    want_value, want = run(small_params, small)
    np.testing.assert_allclose(value, want_value, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, want)


@pytest.mark.parametrize("by_layer", [False, True])
def test_prefill_and_decode_equal_the_full_forward(small, small_params, by_layer):
    """Padded chunks of uneven size, out of order over rows, then one token at a time."""
    rows, length, block = 3, 70, 32
    ids = _ids(small, rows, length)
    want = _hidden(small, small_params, ids)
    params = unstack(small_params) if by_layer else small_params

    @jax.jit
    def feed(cache, ids, positions, at):
        return bind(small, params)(ids, positions, cache=cache, rows=at)

    cache = empty_cache(small, rows, length, block)
    assert cache.length == 96
    for start, end in ((0, 20), (20, 37)):
        for order in ([2, 0], [1, 1]):
            at = jnp.asarray(order)
            positions = np.full((2, 20), cache.length)
            positions[:, : end - start] = range(start, end)
            if order == [1, 1]:
                positions[1] = cache.length  # a row that is all padding
            got, cache = feed(cache, ids[at, start : start + 20], positions, at)
            kept = slice(None) if order == [2, 0] else slice(1)
            np.testing.assert_allclose(
                got[kept, : end - start], want[at[kept], start:end], atol=1e-5
            )
    at = jnp.arange(rows)
    for t in range(37, length):
        got, cache = feed(cache, ids[:, t : t + 1], jnp.full((rows, 1), t), at)
        np.testing.assert_allclose(got[:, 0], want[:, t], atol=1e-5)


def test_padding_writes_nothing(small, small_params):
    cache = empty_cache(small, 2, 32, 16)

    @jax.jit
    def feed(cache, positions):
        return bind(small, small_params)(jnp.ones((2, 4), jnp.int32), positions, cache=cache)[1]

    after = feed(cache, jnp.full((2, 4), cache.length))
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_bfloat16_stays_close(small, small_params):
    """Computing in bfloat16 from float32 parameters: nearby values, float32 gradients."""
    ids = _ids(small, 2, 64)

    def loss(params, config):
        model = bind(config, params)
        hidden, _ = model(ids, _positions(2, 64))
        assert hidden.dtype == config.dtype
        flat = hidden[:, :-1].reshape(-1, config.hidden_size)
        return token_logprobs(flat, model.head(), ids[:, 1:].reshape(-1))[0].mean()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = run(small_params, replace(small, dtype="bfloat16"))
    want, want_grads = run(small_params, small)
    assert abs(value - want) < 0.02
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert got.dtype == jnp.float32
        assert 0 < np.linalg.norm(got - exact) < 0.05 * np.linalg.norm(exact)


def test_every_parameter_names_its_axes(small):
    shapes, axes = abstract(small), logical_axes(small)
    leaves = jax.tree.leaves(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert [len(n) for n in names] == [leaf.ndim for leaf in leaves]
    assert axes["layers"]["q"] == ("layers", "embed", "heads")


def test_init_is_a_function_of_the_seed(small, small_params):
    first = init(small, 0)
    jax.tree.map(np.testing.assert_array_equal, init(small, 0), first)
    assert not np.array_equal(init(small, 1)["embed"], first["embed"])
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, small_params)
