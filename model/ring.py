"""Ring attention: one sequence spread over the devices of the mesh axis ``context``.

Queries stay, keys and values travel around the ring, and the partial results are merged by their
log-sum-exp (https://arxiv.org/abs/2310.01889). A device holds O(T / n) of everything.

Under a causal mask the last of n equal shards would see n times as many keys as the first, and all
would wait for it. So the sequence is cut into 2n chunks, and device i works on chunks i and
2n - 1 - i (https://arxiv.org/abs/2407.21783, section 3.3.2), "early" and "late" here. When the keys
of device j != i come by, two of the four pairs of chunks are visible, and entirely:

    late queries, early keys                always
    early queries, early keys               if j < i
    late queries, late keys                 if j > i

so every device does the same work in every step, and no work is masked away but half of its own
two diagonal blocks. Within a pair of chunks queries go in blocks, one at a time, so that the scores
in memory are [block, T / 2n] a head. The backward pass sends the keys around once more, with their
gradients, and recomputes the probabilities from the saved log-sum-exp as in ``model/attention.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from configs.errors import InputError
from model.attention import MASKED, SAVED

AXIS = "context"
BLOCK = 256  # queries that a device works on at once

Partial = tuple[jax.Array, jax.Array]  # attention over some of the keys, and its log-sum-exp


def ring_attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """``attend(..., impl="context")``: same shapes and dtypes, any T and hd.

    The mesh is the one in force (``jax.set_mesh``), its axes of type Auto. ``context`` splits T;
    over the other axes rows and heads stay split as they are. Inside a ``shard_map`` that has taken
    the axis the arguments are this device's part of the sequence, of even length.

    Raises InputError without such an axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names:
        raise InputError(
            f"attention context needs a mesh with an axis {AXIS!r} (jax.set_mesh), "
            f"here is {dict(mesh.shape) or 'no mesh'}"
        )
    t = q.shape[1]
    if segments is None:
        segments = jnp.zeros_like(q[:, :, 0, 0], jnp.int32)
    if AXIS in mesh.manual_axes:
        if t % 2:
            raise InputError(f"attention context splits each device's tokens in two, got {t}")
        return _attend_local(q, k, v, segments)
    # Chunks of equal blocks. Padding is at the end, where causality hides it from every real token.
    chunk = -(-t // (2 * mesh.shape[AXIS]))
    blocks = -(-chunk // BLOCK)
    length = 2 * mesh.shape[AXIS] * blocks * -(-chunk // blocks)
    q, k, v, segments = (
        jnp.pad(z, [(0, 0), (0, length - t)] + [(0, 0)] * (z.ndim - 2)) for z in (q, k, v, segments)
    )
    spec = PartitionSpec(None, AXIS)
    run = jax.shard_map(
        _attend_local, in_specs=(spec,) * 4, out_specs=spec, axis_names=frozenset({AXIS})
    )
    return run(q, k, v, segments)[:, :t]


def _attend_local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """This device's part: q [B, t, H, hd], k, v [B, t, K, hd], segments [B, t] to [B, t, H*hd]."""
    b, t, h, hd = q.shape
    kv = k.shape[2]
    q = (q * hd**-0.5).reshape(b, t, kv, h // kv, hd).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q, k, v, segments = (_balance(z, axis) for z, axis in ((q, 3), (k, 2), (v, 2), (segments, 1)))
    out = _unbalance(_ring(q, k, v, segments), 3)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h * hd)


def _balance(x: jax.Array, axis: int) -> jax.Array:
    """Chunks 2i and 2i + 1 along ``axis`` to chunks i and 2n - 1 - i, stacked in front.

    Even chunks all go to different devices, and so do odd ones. Chunk i has the parity of i, its
    partner the other one.
    """
    n = jax.lax.axis_size(AXIS)
    first, second = jnp.split(x, 2, axis)
    first = jax.lax.ppermute(first, AXIS, [(i, home_of(2 * i, n)) for i in range(n)])
    second = jax.lax.ppermute(second, AXIS, [(i, home_of(2 * i + 1, n)) for i in range(n)])
    even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.stack([jnp.where(even, first, second), jnp.where(even, second, first)])


def _unbalance(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of ``_balance``."""
    n = jax.lax.axis_size(AXIS)
    even = jax.lax.axis_index(AXIS) % 2 == 0
    first, second = jnp.where(even, x[0], x[1]), jnp.where(even, x[1], x[0])
    first = jax.lax.ppermute(first, AXIS, [(home_of(2 * i, n), i) for i in range(n)])
    second = jax.lax.ppermute(second, AXIS, [(home_of(2 * i + 1, n), i) for i in range(n)])
    return jnp.concatenate([first, second], axis)


def home_of(chunk: int, n: int) -> int:
    """The device that works on this chunk."""
    return min(chunk, 2 * n - 1 - chunk)


@jax.custom_vjp
def _ring(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Attention of scaled q [2, B, K, G, t, hd] over k, v [2, B, K, t, hd]; like q.

    The leading axis is (early, late); segments [2, B, t].
    """
    return _ring_forward(q, k, v, segments)[0]


def _ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mine, keys = (q, segments), (k, v, segments)
    own = _pair(*mine, *keys, diagonal=True)
    cross = _pair(*(z[1:] for z in mine), *(z[:1] for z in keys))
    early, late = _at(own, 0), _merge(_at(own, 1), _at(cross, 0))

    def step(i: jax.Array, carry: Any) -> Any:
        keys, early, late = carry
        further = _pass_on(*keys)  # while we work; the last is for nothing
        ahead = jax.lax.axis_index(AXIS) >= i  # of the device whose keys these are
        both = _pair(*_visible(ahead, mine, keys))
        out, lse = _at(both, 1)
        early = _merge(early, (out, jnp.where(ahead, lse, MASKED)))
        late = _merge(late, (out, jnp.where(ahead, MASKED, lse)))
        return further, early, _merge(late, _at(both, 0))

    carry = _pass_on(*keys), early, late
    _, early, late = jax.lax.fori_loop(1, jax.lax.axis_size(AXIS), step, carry)
    out = checkpoint_name(jnp.stack([early[0], late[0]]).astype(q.dtype), *SAVED)
    lse = checkpoint_name(jnp.stack([early[1], late[1]]), *SAVED)
    return out, (q, k, v, segments, out, lse)


def _ring_backward(
    saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, lse = saved
    delta = (out.astype(jnp.float32) * d_out).sum(-1, keepdims=True)
    mine, keys = (q, segments, d_out, lse, delta), (k, v, segments)
    own = _pair_backward(*mine, *keys, diagonal=True)
    cross = _pair_backward(*(z[1:] for z in mine), *(z[:1] for z in keys))
    d_q, d_k, d_v = (_add(z, d[0], to) for z, d, to in zip(own, cross, (1, 0, 0), strict=True))

    def step(i: jax.Array, carry: Any) -> Any:
        keys, d_q, d_k, d_v = carry
        further = _pass_on(*keys)
        ahead = jax.lax.axis_index(AXIS) >= i
        both = _pair_backward(*_visible(ahead, mine, keys))
        d_k, d_v = _pass_on(d_k, d_v)  # to where the keys are now
        chosen = jnp.where(ahead, 0, 1)
        d_q, d_k, d_v = (
            _add(_add(z, d[0], to), d[1], chosen)
            for z, d, to in zip((d_q, d_k, d_v), both, (1, 0, 0), strict=True)
        )
        return further, d_q, d_k, d_v

    carry = _pass_on(*keys), d_q, d_k, d_v
    _, d_q, d_k, d_v = jax.lax.fori_loop(1, jax.lax.axis_size(AXIS), step, carry)
    d_k, d_v = _pass_on(d_k, d_v)  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _visible(
    ahead: jax.Array, mine: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]
) -> Iterator[jax.Array]:
    """The two visible pairs of chunks: late queries on early keys, and early or late on its like.

    Everything [2, ...] to [2, ...].
    """
    yield from (jnp.stack([z[1], jnp.where(ahead, z[0], z[1])]) for z in mine)
    yield from (jnp.stack([z[0], jnp.where(ahead, z[0], z[1])]) for z in keys)


def _add(total: jax.Array, part: jax.Array, to: int | jax.Array) -> jax.Array:
    """``total`` [2, ...] with ``part`` added to entry ``to``: a selection: .at would scatter."""
    entry = jnp.arange(2).reshape(2, *[1] * part.ndim)
    return total + jnp.where(entry == to, part, 0)


def _pass_on(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """Everything to the next device of the ring."""
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(xs, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _at(partial: Partial, i: int) -> Partial:
    return partial[0][i], partial[1][i]


def _merge(a: Partial, b: Partial) -> Partial:
    """Two partial results over different keys into one over both."""
    lse = jnp.logaddexp(a[1], b[1])
    return a[0] * jnp.exp(a[1] - lse) + b[0] * jnp.exp(b[1] - lse), lse


def _pair(
    q: jax.Array,
    q_segments: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_segments: jax.Array,
    *,
    diagonal: bool = False,
) -> Partial:
    """P chunks of scaled queries [P, B, K, G, t, hd], each over its own k, v [P, B, K, t, hd].

    Every key is visible but for the segments [P, B, t] and, on the diagonal, causality. Returns
    (out [P, B, K, G, t, hd], log-sum-exp [P, B, K, G, t, 1]), both float32.
    """

    def block(xs: tuple[jax.Array, ...]) -> Partial:
        q, q_segments, start = xs
        scores = _scores(q, q_segments, k, k_segments, start if diagonal else None)
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        mass = p.sum(-1, keepdims=True)
        return _einsum("pbkgqc,pbkcd->pbkgqd", p.astype(v.dtype), v) / mass, top + jnp.log(mass)

    out, lse = jax.lax.map(block, _blocks((q, 4), (q_segments, 2)))
    return _whole(out), _whole(lse)


def _pair_backward(
    q: jax.Array,
    q_segments: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_segments: jax.Array,
    *,
    diagonal: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """These pairs' part of the gradients of q, k and v, float32."""

    def block(
        sums: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q, q_segments, d_out, lse, delta, start = xs
        p = jnp.exp(_scores(q, q_segments, k, k_segments, start if diagonal else None) - lse)
        d_p = _einsum("pbkgqd,pbkcd->pbkgqc", d_out, v)
        d_s = (p * (d_p - delta)).astype(k.dtype)
        d_k = sums[0] + _einsum("pbkgqc,pbkgqd->pbkcd", d_s, q)
        d_v = sums[1] + _einsum("pbkgqc,pbkgqd->pbkcd", p.astype(v.dtype), d_out)
        return (d_k, d_v), _einsum("pbkgqc,pbkcd->pbkgqd", d_s, k)

    zeros = jnp.zeros_like(k, jnp.float32)
    blocks = _blocks((q, 4), (q_segments, 2), (d_out, 4), (lse, 4), (delta, 4))
    (d_k, d_v), d_q = jax.lax.scan(block, (zeros, zeros), blocks)
    return _whole(d_q), d_k, d_v


def _scores(
    q: jax.Array,
    q_segments: jax.Array,
    k: jax.Array,
    k_segments: jax.Array,
    start: jax.Array | None,
) -> jax.Array:
    """Masked scores [P, B, K, G, block, t] float32; causal from query ``start`` on if given."""
    visible = q_segments[..., :, None] == k_segments[..., None, :]
    if start is not None:
        visible &= start + jnp.arange(q.shape[4])[:, None] >= jnp.arange(k.shape[3])
    bias = jnp.where(visible, 0.0, MASKED)[:, :, None, None]
    return _einsum("pbkgqd,pbkcd->pbkgqc", q, k) + bias


def _blocks(*xs: tuple[jax.Array, int]) -> tuple[jax.Array, ...]:
    """Arrays cut into blocks along their axis, the blocks in front, and where each block starts."""
    x, axis = xs[0]
    t = x.shape[axis]
    count = next(c for c in range(-(-t // BLOCK), t + 1) if t % c == 0)
    cut = (
        jnp.moveaxis(x.reshape(*x.shape[:axis], count, t // count, *x.shape[axis + 1 :]), axis, 0)
        for x, axis in xs
    )
    return *cut, jnp.arange(0, t, t // count)


def _whole(x: jax.Array) -> jax.Array:
    """[blocks, P, B, K, G, block, n] -> [P, B, K, G, t, n]."""
    x = jnp.moveaxis(x, 0, 4)
    return x.reshape(*x.shape[:4], -1, x.shape[-1])


def _einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
