"""An initialisation that can already copy.

A policy that edits code must copy paths, line numbers and names out of its context. Transformers
learn this with induction heads (Olsson et al. 2022, arXiv 2209.11895), and a tiny model spends most
of a small budget before the two heads of that circuit find each other. Here they are put in place
from the start; everything else is as `qwen3.init` leaves it, and training may change all of it.

Layout of the residual stream: dimension 0 is a constant, the last 2·C dimensions are free for the
codes of the two tokens before, the rest holds the token.
  layer 0: the query heads of key head 0 look one and two positions back and write a C-dimensional
    code of what they see into the free dimensions.
  layer 1: one query head of each key head looks for positions whose code of the token before (key
    head 0), or of the two tokens before (key head 1), equals the present one, and writes the token
    found there back as content, which the tied output projection turns into its logit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.config import Qwen3Config
from model.qwen3 import Params, init

CODE = 32  # C: dimensions of a token's code
BACK_GAIN, FIND_GAIN = 4.0, 4.0  # norms of queries and keys, which set how sharp attention is
WRITE = 8.0  # how strongly a found token is written, relative to the present one


def copying_init(config: Qwen3Config, seed: int) -> Params:
    """Parameters like `qwen3.init`, with the copying circuit in layers 0 and 1.

    Needs tied embeddings, two key heads with at least two query heads each, and head_dim 64 or
    more with slow enough rotary pairs (rope_theta 1e6) to match content over the whole context.
    """
    heads, kv, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if not config.tie_word_embeddings or kv < 2 or heads < 2 * kv or hd < 2 * CODE:
        raise ValueError("copying_init needs tied embeddings, 2 key heads, 4 heads, head_dim 64")
    rng = np.random.default_rng(seed)
    params = {k: _writable(v) for k, v in init(config, seed).items()}
    layers, group, half = params["layers"], heads // kv, hd // 2
    d = config.hidden_size
    content, codes = slice(1, d - 2 * CODE), [slice(d - 2 * CODE, d - CODE), slice(d - CODE, d)]
    width = d - 2 * CODE - 1

    embed = params["embed"]
    embed[:, codes[0].start :] = 0.0
    embed[:, 0] = 2.0 * d**-0.5
    code = _orthonormal(rng, width, CODE)

    # layer 0: look back by one and by two; with rotary phases, the score of offset n is
    # sum_i cos(rate_i (n - back)), over the fastest pairs
    rates = config.rope_theta ** (-np.arange(half) / half)
    q, k, v, o = (layers[name][0] for name in ("q", "k", "v", "o"))
    k[:, :hd], v[:, :hd] = 0.0, 0.0
    k[0, :3] = 1.0
    v[content, :CODE] = code
    for head, back in ((0, 1), (1, 2)):
        columns = slice(head * hd, (head + 1) * hd)
        q[:, columns] = 0.0
        q[0, head * hd + np.arange(3)] = np.cos(back * rates[:3])
        q[0, head * hd + half + np.arange(3)] = -np.sin(back * rates[:3])
        o[head * hd : head * hd + CODE, codes[back - 1]] = d**-0.5 * np.eye(CODE)
    layers["q_norm"][0] = layers["k_norm"][0] = BACK_GAIN

    # layer 1: match codes in the slow pairs, which hardly turn within a context
    q, k, v, o = (layers[name][1] for name in ("q", "k", "v", "o"))
    slow = np.r_[half // 2 : half, half + half // 2 : hd][:CODE]
    tokens = _orthonormal(rng, width, min(2 * hd, width))
    for pair in range(2):
        keys, head = slice(pair * hd, (pair + 1) * hd), pair * group
        columns = slice(head * hd, (head + 1) * hd)
        q[:, columns], k[:, keys], v[:, keys] = 0.0, 0.0, 0.0
        if pair == 0:
            q[content, head * hd + slow] = code
            k[codes[0], pair * hd + slow] = np.eye(CODE)
        else:  # half of the dimensions for each of the two tokens before
            first, second = slow[: CODE // 2], slow[CODE // 2 :]
            q[content, head * hd + first] = code[:, : CODE // 2]
            q[codes[0], head * hd + second] = np.eye(CODE)[:, : CODE // 2]
            k[codes[0], pair * hd + first] = np.eye(CODE)[:, : CODE // 2]
            k[codes[1], pair * hd + second] = np.eye(CODE)[:, : CODE // 2]
        part = tokens[:, pair * hd : (pair + 1) * hd]
        v[content, pair * hd : pair * hd + part.shape[1]] = part
        o[head * hd : head * hd + part.shape[1], content] = WRITE * d**-0.5 * part.T
    layers["q_norm"][1] = layers["k_norm"][1] = FIND_GAIN
    return params


def _writable(tree: Any) -> Any:
    return {k: _writable(v) for k, v in tree.items()} if isinstance(tree, dict) else np.array(tree)


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0].astype(np.float32)
