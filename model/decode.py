"""Continuous batching: many episodes share one KV cache, each keeps its prefix between turns.

Every episode owns a slot (a row of the cache). Three programs, compiled once:

    prefill: R rows × C tokens, each row a chunk of any slot's new tokens
    decode:  all slots × up to N tokens, one after the other, stops handled on the device
    copy:    one row's content into another: tokens that episodes share are computed once

What an episode samples depends on the weights, its own tokens and its seed, and on nothing else:
not on its slot, nor on who shares the batch, bit for bit. Shapes never change; each row's
arithmetic is its own; chunks are cut from the episode's own sequence of ``extend`` calls; and the
uniform number behind token i of an episode comes from ``fold_in(seed, i)``.
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import InputError
from model.config import Qwen3Config
from model.prefixes import Fill, Prefixes, key_of
from model.qwen3 import KVCache, Params, abstract, bind, empty_cache, unstack

MAX_STOPS = 8
PREFILL_PATIENCE = 2  # decode dispatches that a prefill batch waits to fill up
BLOCK, MAX_BLOCKS = 128, 16  # of the cache: long ones have larger blocks, not many more
GROUP = 64  # vocabulary entries summed together when sampling


@dataclass(frozen=True)
class Result:
    """What one ``sample`` call produced.

    ids: sampled tokens, a stop token included. logprobs: of each under softmax(logits /
    temperature), before any top-k or top-p. versions: of the weights that sampled each token.
    finish: "stop" or "length".
    """

    slot: int
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str
    version: int  # of the weights at the last token


@dataclass
class _Slot:
    """Host-side account of one slot."""

    length: int = 0  # tokens of the episode so far, ``pending`` included
    pending: int | None = None  # the last token: not in the cache until decode feeds it
    unfed: int = 0  # tokens still waiting for prefill
    key: bytes = b""  # of what the cache holds up to the last ``extend``; see model/prefixes.py
    sampled: list[int] = field(default_factory=list)  # since then: token, version, token, ...
    job: _Job | None = None


@dataclass
class _Job:
    """A running ``sample`` call."""

    remaining: int
    stop_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class _Chunk(NamedTuple):
    slot: int
    start: int
    tokens: Sequence[int]
    ends: bytes | None  # the key of the fill whose last chunk this is


Array = jax.Array | np.ndarray


class _Lanes(NamedTuple):
    """Per-slot inputs of the decode program, all of length ``slots``."""

    token: Array  # int32, fed next
    position: Array  # int32, of that token
    active: Array  # bool
    remaining: Array  # int32, tokens still to sample
    seed: Array  # uint32 [slots, 2], low and high word
    temperature: Array  # float32, 0: greedy
    stops: Array  # int32 [slots, MAX_STOPS], -1: none
    top_k: Array  # int32, 0: off
    top_p: Array  # float32, 1: off


def check_room(config: Qwen3Config, slots: int, max_len: int, room: int | None = None) -> None:
    """Raise InputError where an engine cannot fit: its weights and its cache lie on one device.

    ``room``: bytes of that device; None: of this host's first, on a CPU the machine's memory.
    """
    if room is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = stats.get("bytes_limit", machine)
    cache = jax.eval_shape(lambda: _cache(config, slots, max_len))
    needs = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((abstract(config), cache))
    )
    if needs > room:
        raise InputError(
            f"the in-process server holds the policy whole on one device: with {slots} slots of "
            f"{max_len} tokens it takes {needs / 2**30:.1f} GiB, and there are {room / 2**30:.1f}: "
            "take a smaller policy, or fewer server.slots or agent.max_tokens"
        )


def _cache(config: Qwen3Config, slots: int, max_len: int) -> KVCache:
    """An empty one, in blocks whose number stays small."""
    block = BLOCK * max(1, max_len // (BLOCK * MAX_BLOCKS))
    return empty_cache(config, slots, max_len, block)


class Engine:
    """See the module's docstring. Single-threaded: every method is called from one thread.

    Args:
        params, config: the model; its weights may be replaced by ``set_params``, and None waits
            for it.
        slots: episodes held at one time. max_len: tokens an episode may have in all.
        prefill_chunk, prefill_rows: C and R of the prefill program.
        decode_tokens: N, tokens a decode dispatch samples at most for each slot.
        truncation: compile top-k and top-p in; without it they may not be asked for.
    """

    def __init__(
        self,
        params: Params | None,
        config: Qwen3Config,
        slots: int,
        max_len: int,
        *,
        prefill_chunk: int = 64,
        prefill_rows: int = 8,
        decode_tokens: int = 8,
        truncation: bool = False,
    ) -> None:
        self.slots, self.max_len, self.config = slots, max_len, config
        self._rows, self._columns = prefill_rows, prefill_chunk
        self._truncation = truncation
        self._slots: list[_Slot | None] = [None] * slots
        self._free = deque(range(slots))  # the longest free first: the others' rows may be of use
        self._queue: deque[_Chunk] = deque()
        self._waited = 0  # decode dispatches since a chunk began to wait
        # everything on one device by name: arrays that merely happen to be there compile again
        self._device = jax.local_devices()[0]
        self._cache = jax.device_put(_cache(config, slots, max_len), self._device)
        self._prefixes = Prefixes(slots)
        self.prefilled = 0  # tokens so far that were computed, not copied
        # jit counts by function what it compiled: each engine has a function of its own
        self._copy = jax.jit(functools.partial(_copy), donate_argnums=0)
        self._prefill = jax.jit(functools.partial(_prefill, config), donate_argnums=1)
        self._decode = jax.jit(
            functools.partial(_decode, config, decode_tokens, truncation), donate_argnums=1
        )
        if params is not None:
            self.set_params(params, 0)

    def set_params(self, params: Params, version: int) -> None:
        """Use these weights from the next step on; cached keys and values stay as they are."""
        self._params = jax.jit(unstack)(jax.device_put(params, self._device))
        self.version = version

    def warmup(self) -> None:
        """Compile the programs now rather than at the first step."""
        self._copy_blocks(0, 0, 1)
        self._run_prefill([])
        self._run_decode([])

    def open(self) -> int:
        """A free slot, now holding an empty episode. Raises RuntimeError if there is none."""
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots are in use")
        index = self._free.popleft()
        self._slots[index] = _Slot()
        return index

    def close(self, slot: int) -> None:
        """Free a slot, whatever it is doing; a running sample never reports."""
        self._at(slot)
        self._slots[slot] = None
        self._free.append(slot)
        self._queue = deque(chunk for chunk in self._queue if chunk.slot != slot)
        for key, fill in self._prefixes.leave(slot):
            self._enqueue(fill, key)

    def room(self, slot: int) -> int:
        """Tokens the slot's episode may still gain."""
        return self.max_len - self._at(slot).length

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """Append tokens that the environment wrote. Raises ValueError if they do not fit."""
        state = self._at(slot)
        if state.job is not None:
            raise ValueError(f"slot {slot} is sampling")
        if len(ids) > self.room(slot):
            raise ValueError(f"slot {slot}: {len(ids)} tokens do not fit, {self.room(slot)} left")
        if len(ids) == 0:
            return
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is not in the vocabulary")
        known = [] if state.pending is None else [state.pending]
        fed = [*known, *ids][:-1]
        fresh = state.length == 0
        fill = Fill(slot, state.length - len(known), fed)
        state.key = key_of(state.key, self.version, state.sampled, ids)
        state.sampled.clear()
        state.length += len(ids)
        state.pending = int(ids[-1])
        source = self._prefixes.holder(state.key)
        if fresh:
            self._prefixes.forget(slot)
        if fed:
            self._fill(state, fill, source)

    def _fill(self, state: _Slot, fill: Fill, source: int | None) -> None:
        """Bring tokens into a row: from one that has them, or will have them, or by prefill."""
        if state.unfed:  # a second call before the first is done, which is rare: nothing is shared
            self._enqueue(self._prefixes.unfollow(fill.row))
            self._enqueue(fill)
        elif source is not None:
            self._run_copy(source, [fill.row])
            self._prefixes.hold(fill.row, state.key)
            return
        elif not self._prefixes.follow(state.key, fill.row):
            self._prefixes.begin(state.key, fill)
            self._enqueue(fill, state.key)
        state.unfed += len(fill.tokens)

    def _enqueue(self, fill: Fill | None, key: bytes | None = None) -> None:
        """Queue a fill's chunks; the last one names its key."""
        if fill is None:
            return
        for i in range(0, len(fill.tokens), self._columns):
            tokens = fill.tokens[i : i + self._columns]
            ends = key if i + self._columns >= len(fill.tokens) else None
            self._queue.append(_Chunk(fill.row, fill.start + i, tokens, ends))

    def sample(
        self,
        slot: int,
        *,
        max_new: int,
        stop_ids: Sequence[int] = (),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Start sampling behind what the slot holds; ``step`` reports when it has ended.

        Args:
            max_new: tokens at most; the slot's room limits it too.
            temperature: 0 takes the likeliest token and records log-probabilities at 1.
            seed: 0 <= seed < 2^64, of the episode: turns of one episode may share it.
        """
        state = self._at(slot)
        if state.job is not None:
            raise ValueError(f"slot {slot} is sampling already")
        if state.pending is None:
            raise ValueError(f"slot {slot} is empty: extend it first")
        if len(stop_ids) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop ids, got {len(stop_ids)}")
        if (top_k or top_p < 1) and not self._truncation:
            raise ValueError("top_k and top_p need an Engine made with truncation=True")
        remaining = min(max_new, self.room(slot))
        state.job = _Job(remaining, tuple(stop_ids), temperature, top_k, top_p, seed)

    def step(self) -> list[Result]:
        """Advance: prefill what waits, then one decode dispatch if any slot can.

        A decode dispatch costs nearly the same for one slot as for all, so full prefill batches go
        first; one that is not full waits for company, a few dispatches at most.

        Returns the samples that have ended. A step with nothing to do returns at once.
        """
        done = [
            self._finish(index, "length")
            for index, slot in enumerate(self._slots)
            if slot is not None and slot.job is not None and slot.job.remaining < 1
        ]
        ready = self._ready()
        while self._queue and (
            len(self._queue) >= self._rows or not ready or self._waited >= PREFILL_PATIENCE
        ):
            count = min(self._rows, len(self._queue))
            self._run_prefill([self._queue.popleft() for _ in range(count)])
            self._waited = 0
            ready = self._ready()
        if ready:
            self._waited += bool(self._queue)
            done += self._run_decode(ready)
        return done

    def _ready(self) -> list[int]:
        """Slots that decode can serve: sampling, and nothing of theirs waits for prefill."""
        return [
            index
            for index, slot in enumerate(self._slots)
            if slot is not None and slot.job is not None and slot.unfed == 0
        ]

    @property
    def compiled(self) -> int:
        """Programs compiled so far: three after warm-up, and never more."""
        return sum(program._cache_size() for program in (self._copy, self._prefill, self._decode))  # type: ignore[attr-defined]

    def _at(self, slot: int) -> _Slot:
        state = self._slots[slot] if 0 <= slot < self.slots else None
        if state is None:
            raise ValueError(f"slot {slot} is not open")
        return state

    def _run_prefill(self, chunks: Sequence[_Chunk]) -> None:
        tokens = np.zeros((self._rows, self._columns), np.int32)
        positions = np.full((self._rows, self._columns), self._cache.length, np.int32)
        rows = np.zeros(self._rows, np.int32)
        for i, (slot, start, ids, _) in enumerate(chunks):
            tokens[i, : len(ids)] = ids
            positions[i, : len(ids)] = np.arange(start, start + len(ids))
            rows[i] = slot
            self._at(slot).unfed -= len(ids)
            self.prefilled += len(ids)
        self._cache = self._prefill(self._params, self._cache, tokens, positions, rows)
        for key in (chunk.ends for chunk in chunks if chunk.ends is not None):
            fill = self._prefixes.end(key)
            self._run_copy(fill.row, fill.followers)
            for row in fill.followers:
                self._at(row).unfed = 0

    def _run_copy(self, source: int, rows: Sequence[int]) -> None:
        for row in rows:
            if row != source:
                self._copy_blocks(source, row, self._at(row).length)

    def _copy_blocks(self, source: int, row: int, length: int) -> None:
        """Those blocks of a row that hold its first ``length`` tokens."""
        k, v = ([list(layer) for layer in side] for side in self._cache)
        for block in range(-(-length // self._cache.block)):
            layers = tuple((k[i][block], v[i][block]) for i in range(len(k)))
            copied = self._copy(layers, np.int32(source), np.int32(row))
            for i, (keys, values) in enumerate(copied):
                k[i][block], v[i][block] = keys, values
        self._cache = KVCache(tuple(map(tuple, k)), tuple(map(tuple, v)))

    def _run_decode(self, ready: Sequence[int]) -> list[Result]:
        n = self.slots
        lanes = _Lanes(
            token=np.zeros(n, np.int32),
            position=np.zeros(n, np.int32),
            active=np.zeros(n, bool),
            remaining=np.zeros(n, np.int32),
            seed=np.zeros((n, 2), np.uint32),
            temperature=np.zeros(n, np.float32),  # greedy: of an idle slot nothing is drawn
            stops=np.full((n, MAX_STOPS), -1, np.int32),
            top_k=np.zeros(n, np.int32),
            top_p=np.ones(n, np.float32),
        )
        for index in ready:
            state = self._at(index)
            job = state.job
            assert job is not None
            lanes.token[index], lanes.position[index] = state.pending, state.length - 1
            lanes.active[index], lanes.remaining[index] = True, job.remaining
            lanes.seed[index] = job.seed & 0xFFFFFFFF, job.seed >> 32
            lanes.temperature[index] = job.temperature
            lanes.stops[index, : len(job.stop_ids)] = job.stop_ids
            lanes.top_k[index], lanes.top_p[index] = job.top_k, job.top_p
        self._cache, tokens, logprobs = self._decode(self._params, self._cache, lanes)
        return self._account(ready, np.asarray(tokens), np.asarray(logprobs))

    def _account(
        self, ready: Sequence[int], tokens: np.ndarray, logprobs: np.ndarray
    ) -> list[Result]:
        """Book the tokens [N, slots] of a dispatch, -1 behind a slot's last; the ended samples."""
        done = []
        for index in ready:
            state = self._at(index)
            job = state.job
            assert job is not None
            ids = tokens[:, index]
            count = int((ids >= 0).sum())
            job.ids += ids[:count].tolist()
            job.logprobs += logprobs[:count, index].tolist()
            job.versions += [self.version] * count
            job.remaining -= count
            state.length += count
            state.pending = job.ids[-1]
            state.sampled += [n for token in job.ids[-count:] for n in (token, self.version)]
            if job.ids[-1] in job.stop_ids:
                done.append(self._finish(index, "stop"))
            elif job.remaining < 1:
                done.append(self._finish(index, "length"))
        return done

    def _finish(self, slot: int, finish: str) -> Result:
        state = self._at(slot)
        job = state.job
        assert job is not None
        state.job = None
        return Result(slot, job.ids, job.logprobs, job.versions, finish, self.version)


def _prefill(
    config: Qwen3Config,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
) -> KVCache:
    """Write keys and values of tokens [R, C] of cache rows [R]; position = length is padding."""
    _, written = bind(config, params)(tokens, positions, cache=cache, rows=rows)
    assert written is not None
    return written


def _copy(arrays: Any, source: jax.Array, row: jax.Array) -> Any:
    """What each array [R, ...] has in row ``source``, in ``row`` as well."""

    def one(x: jax.Array) -> jax.Array:
        return x.at[row].set(x[source])

    return jax.tree.map(one, arrays)


def _decode(
    config: Qwen3Config, limit: int, truncation: bool, params: Params, cache: KVCache, lanes: _Lanes
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Up to ``limit`` tokens for each active slot: (cache, tokens [limit, slots], logprobs).

    Tokens are -1 where a slot was inactive or had ended.
    """
    model = bind(config, params)
    head = model.head()
    shape = (limit, lanes.token.shape[0])

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, cache, lanes, tokens, logprobs = state
        position = jnp.where(lanes.active, lanes.position, cache.length)
        hidden, written = model(lanes.token[:, None], position[:, None], cache=cache)
        logits = jnp.matmul(
            hidden[:, 0], head.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        token, logprob = _sample(logits, lanes, truncation)
        active = lanes.active
        ended = (token[:, None] == lanes.stops).any(-1) | (lanes.remaining <= 1)
        tokens = tokens.at[i].set(jnp.where(active, token, -1))
        logprobs = logprobs.at[i].set(jnp.where(active, logprob, 0.0))
        lanes = lanes._replace(
            token=token,
            position=lanes.position + 1,
            active=active & ~ended,
            remaining=lanes.remaining - 1,
        )
        return i + 1, written, lanes, tokens, logprobs

    def more(state: tuple[Any, ...]) -> jax.Array:
        return (state[0] < limit) & state[2].active.any()

    start = (jnp.int32(0), cache, lanes, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape))
    _, cache, _, tokens, logprobs = jax.lax.while_loop(more, body, start)
    return cache, tokens, logprobs


def _sample(logits: jax.Array, lanes: _Lanes, truncation: bool) -> tuple[jax.Array, jax.Array]:
    """One token per slot from logits [slots, V] and its log-probability.

    Inverse transform sampling: one uniform number per token, against the running sum of
    probabilities. A Gumbel draw would need one random number per vocabulary entry.
    """
    greedy = lanes.temperature <= 0
    z = logits / jnp.where(greedy, 1.0, lanes.temperature)[:, None]
    z = z - z.max(-1, keepdims=True)
    p = jnp.exp(z)
    mass = p.sum(-1)
    likeliest = jnp.where(z == 0, jnp.arange(z.shape[-1]), z.shape[-1]).min(-1)  # a fast argmax

    def draw() -> jax.Array:
        kept = _truncate(z, p / mass[:, None], lanes) if truncation else p
        drawn = _invert(kept, _uniform(lanes.seed, lanes.position + 1))
        return jnp.where(greedy, likeliest, drawn).astype(jnp.int32)

    token = jax.lax.cond(greedy.all(), lambda: likeliest.astype(jnp.int32), draw)
    logprob = jnp.take_along_axis(z, token[:, None], 1)[:, 0] - jnp.log(mass)
    return token, logprob


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The entry of weights [slots, V] at which their running sum passes uniform * total.

    In two levels, because a running sum over the whole vocabulary costs more than the output
    projection does on a CPU.
    """
    slots, v = weights.shape
    grouped = jnp.pad(weights, ((0, 0), (0, -v % GROUP))).reshape(slots, -1, GROUP)
    sums = grouped.sum(-1)
    upto = jnp.cumsum(sums, axis=-1)
    draw = uniform[:, None] * upto[:, -1:]
    group = _passes(upto, draw)
    draw = draw - jnp.take_along_axis(upto - sums, group, 1)
    upto = jnp.cumsum(jnp.take_along_axis(grouped, group[..., None], 1)[:, 0], axis=-1)
    return (group * GROUP + _passes(upto, draw))[:, 0]


def _passes(upto: jax.Array, draw: jax.Array) -> jax.Array:
    """First index of each row of ``upto`` above ``draw`` [slots, 1], and never one that added
    nothing, though ``draw`` may round up to the total."""
    index = jnp.minimum((upto <= draw).sum(-1), (upto < upto[:, -1:]).sum(-1))
    return index[:, None]


def _uniform(seed: Array, index: Array) -> jax.Array:
    """One number in [0, 1) per slot, a function of its seed [slots, 2] and token index [slots]."""

    def one(seed: Array, index: Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed[0]), seed[1])
        return jax.random.uniform(jax.random.fold_in(key, index))

    return jax.vmap(one)(seed, index)


def _truncate(z: jax.Array, p: jax.Array, lanes: _Lanes) -> jax.Array:
    """Probabilities [slots, V], zero outside the top-k entries and the top-p nucleus."""
    v = z.shape[-1]
    ordered = -jnp.sort(-z, axis=-1)
    k = jnp.where(lanes.top_k > 0, jnp.minimum(lanes.top_k, v), v)
    before = jnp.cumsum(-jnp.sort(-p, axis=-1), axis=-1)
    nucleus = jnp.minimum((before < lanes.top_p[:, None]).sum(-1) + 1, v)
    last = jnp.minimum(k, jnp.where(lanes.top_p < 1, nucleus, v)) - 1
    return jnp.where(z >= jnp.take_along_axis(ordered, last[:, None], 1), p, 0.0)
