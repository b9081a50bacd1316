"""Log-probabilities of given token ids under a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model.config import Qwen3Config
from model.logprobs import likeliest, token_logprobs
from model.qwen3 import Params, bind

ROW_TOKENS = 4096  # tokens of a forward pass, at least one row


def score(
    params: Params,
    config: Qwen3Config,
    ids: np.ndarray,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced scores of rows of ids [n, t].

    Returns (logprobs [n, t-1] float32: of ids[:, 1:] given what stands before each,
    argmax [n, t] int32: the likeliest token behind each prefix).
    """
    n, t = ids.shape
    rows = max(1, min(n, ROW_TOKENS // t))
    logprobs = np.empty((n, t - 1), np.float32)
    argmax = np.empty((n, t), np.int32)
    for start in range(0, n, rows):
        batch = np.asarray(ids[start : start + rows], np.int32)
        count = len(batch)
        batch = np.pad(batch, ((0, rows - count), (0, 0)))  # one shape, so one compilation
        some, best = _forward(config, params, batch)
        logprobs[start : start + count] = np.asarray(some)[:count]
        argmax[start : start + count] = np.asarray(best)[:count]
        progress(start + count, n)
    return logprobs, argmax


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: Qwen3Config, params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    model = bind(config, params)
    hidden, _ = model(ids, positions)
    best = likeliest(hidden.reshape(rows * length, -1), model.head())
    before = hidden[:, :-1].reshape(rows * (length - 1), -1)
    logprob, _ = token_logprobs(before, model.head(), ids[:, 1:].reshape(-1))
    return logprob.reshape(rows, length - 1), best.reshape(rows, length)
