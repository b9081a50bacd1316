"""token_logprobs against log_softmax in float64, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.logprobs import token_logprobs

N, D, V = 7, 5, 50


def _inputs(seed: int = 0, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden = spread * rng.normal(size=(N, D))
    return hidden, rng.normal(size=(D, V)), rng.integers(0, V, N).astype(np.int32)


def _golden(hidden, head, targets, temperature):
    """(logprobs, entropies) in float64, straight from the definition."""
    z = hidden @ head / temperature
    z = z - z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return logp[np.arange(len(targets)), targets], -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1000, 50, 25, 16, 7, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_log_softmax_in_float64(chunk, temperature):
    hidden, head, targets = _inputs()
    got = token_logprobs(
        jnp.float32(hidden), jnp.float32(head), targets, temperature=temperature, chunk=chunk
    )
    for ours, golden in zip(got, _golden(hidden, head, targets, temperature), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, golden, rtol=2e-5, atol=2e-5)


def test_extreme_logits_stay_finite():
    hidden, head, targets = _inputs(spread=300.0)
    logprobs, entropies = token_logprobs(jnp.float32(hidden), jnp.float32(head), targets, chunk=16)
    golden = _golden(hidden, head, targets, 1.0)
    np.testing.assert_allclose(logprobs, golden[0], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(entropies, golden[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("chunk", [50, 16])
def test_gradient_matches_finite_differences_in_float64(chunk):
    hidden, head, targets = _inputs(1, spread=1.0)
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, N))
    temperature = 0.8

    def ours(hidden, head):
        lp, ent = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
        return (a * lp + b * ent).sum()

    grads = jax.grad(ours, (0, 1))(jnp.float32(hidden), jnp.float32(head))

    def golden(hidden, head):
        lp, ent = _golden(hidden, head, targets, temperature)
        return (a * lp + b * ent).sum()

    eps = 1e-6
    for which, grad in enumerate(grads):
        args = [hidden, head]
        numeric = np.zeros_like(args[which])
        for index in np.ndindex(numeric.shape):
            for sign in (1, -1):
                moved = args[which].copy()
                moved[index] += sign * eps
                numeric[index] += sign * golden(*(moved if i == which else args[i] for i in (0, 1)))
        np.testing.assert_allclose(grad, numeric / (2 * eps), rtol=1e-3, atol=1e-4)


def test_no_array_of_the_whole_vocabulary_is_held():
    """With a chunk of 1024 of 65536 entries, peak temporaries stay far below [N, V]."""
    n, d, v, chunk = 256, 8, 65_536, 1024
    spec = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (d, v))]

    def loss(hidden, head, targets):
        return token_logprobs(hidden, head, targets, chunk=chunk)[0].sum()

    step = jax.jit(jax.grad(loss, (0, 1)))
    compiled = step.lower(*spec, jax.ShapeDtypeStruct((n,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4 / 4
