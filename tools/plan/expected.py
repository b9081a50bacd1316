"""A job's figures by formula: what ranks the choices that are not compiled.

The collectives are those of ``model/parallel.py``'s calls, with the bytes that mathematics asks
for; ``tests/tools/plan/test_collectives.py`` says which the compiler makes of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from model.logprobs import CHUNK, even_chunk
from model.parallel import CONTEXT, ROWS, TENSOR, WEIGHTS
from model.ring import home_of
from tools.plan.figures import Figures, figures
from tools.plan.flops import adapter_parameters, per_token
from tools.plan.groups import Groups
from tools.plan.hlo import SENT, Collective, Program
from tools.plan.job import Job
from tools.plan.memory import BYTES, estimate, matrices
from tools.plan.placement import Placement
from tools.plan.programs import REFERENCE, STEP

_REPLICAS = ("slice", "data")


def expected(job: Job, place: Placement) -> dict[str, Figures]:
    """Figures of the programs of an update, with nothing compiled."""
    names = [STEP, REFERENCE] if job.reference else [STEP]
    return {name: _figures(job, place, training=name == STEP) for name in names}


def flops_on_device(job: Job, *, training: bool = True) -> tuple[float, float]:
    """(the model's FLOPs, the program's) of one execution on one device."""
    found = per_token(
        job.model, job.tokens, targets=job.targets, mesh=job.mesh.sizes, training=training
    )
    tokens = _tokens(job) * (job.microbatches if training else 1) / job.mesh.tensor
    return found.model * tokens, found.done * tokens


def _tokens(job: Job) -> float:
    """Tokens of a microbatch that a tensor group works on."""
    sizes = job.mesh.sizes
    return job.microbatch_rows * job.tokens / math.prod(sizes[a] for a in (*ROWS, CONTEXT))


def _figures(job: Job, place: Placement, *, training: bool) -> Figures:
    sizes = job.mesh.sizes
    rows = job.microbatch_rows // math.prod(sizes[a] for a in ROWS)
    memory = estimate(
        job.model,
        sizes,
        rows,
        job.tokens,
        microbatches=job.microbatches,
        targets=job.targets,
        training=training,
        offload=job.optimizer.offload,
    )
    found = per_token(job.model, job.tokens, targets=job.targets, mesh=sizes, training=training)
    times = job.microbatches if training else 1
    tokens = times * _tokens(job)
    program = Program(
        matmul_flops=found.done_matmul * tokens / job.mesh.tensor,
        attention_flops=found.done_attention * tokens / job.mesh.tensor,
        hbm_bytes=_hbm(job, training=training),
        collectives=tuple(_collectives(job, place, training=training)),
        loops=(),
        notes=(),
    )
    return figures(memory, program, place, job.slice)


def _hbm(job: Job, *, training: bool) -> float:
    """Bytes to and from HBM: roughly, for training is seldom bound by them.

    A matrix is written where it was gathered and read for each product. What a layer computes is
    written once and read twice in each pass over it. The optimizer reads and writes its state.
    """
    c, sizes = job.model, job.mesh.sizes
    wide, stored = BYTES[c.dtype], BYTES[c.param_dtype]
    passes = 4 if training else 1  # forward, again, and two of the backward pass
    weights = c.num_hidden_layers * matrices(c) / sizes[TENSOR] * wide * 2 * passes
    width = 8 * c.hidden_size + 6 * c.num_attention_heads * c.head_dim + 4 * c.intermediate_size
    activations = c.num_hidden_layers * _tokens(job) * width / sizes[TENSOR] * wide * 3 * passes
    total = weights + activations
    if training:
        shards = math.prod(sizes[a] for a in (*WEIGHTS, TENSOR))
        total = total * job.microbatches + 8 * c.num_parameters / shards * stored
    return total


def _collectives(job: Job, place: Placement, *, training: bool) -> Iterator[Collective]:
    """Rows by kind and axes, those that send next to nothing left out."""
    c, sizes = job.model, job.mesh.sizes
    wide = BYTES[c.dtype]
    tensor = sizes[TENSOR]
    stream = _tokens(job) * c.hidden_size * wide
    repeats = job.microbatches if training else 1
    layers = c.num_hidden_layers * repeats
    make = _Maker(place, c.dtype)

    vocabulary = c.vocab_size // tensor
    chunk = even_chunk(vocabulary, CHUNK)
    head = c.hidden_size * math.ceil(vocabulary / chunk) * chunk * wide
    layer = (matrices(c) + adapter_parameters(c)) / tensor * wide
    trained = adapter_parameters(c) / tensor * wide if c.lora else layer
    yield from make("all-gather", WEIGHTS, layer, layers * (2 if training else 1))
    yield from make("all-gather", WEIGHTS, head, repeats * (2 if training else 1))
    yield from make("all-to-all", WEIGHTS, stream / tensor, repeats * (2 if training else 1))
    if training:
        yield from make("reduce-scatter", WEIGHTS, trained, layers)
        yield from make("reduce-scatter", WEIGHTS, head, repeats)

    # of a layer: two gathers and two scatters, the same turned round, and what is made again
    gathers, scatters = {"none": (0, 0), "dots": (2, 0)}.get(c.remat, (2, 1))
    if training:
        yield from make("all-gather", (TENSOR,), stream, layers * (4 + gathers) + 2 * repeats)
        yield from make("reduce-scatter", (TENSOR,), stream, layers * (4 + scatters) + 2 * repeats)
    else:
        yield from make("all-gather", (TENSOR,), stream, layers * 2 + repeats)
        yield from make("reduce-scatter", (TENSOR,), stream, layers * 2 + repeats)

    if sizes[CONTEXT] > 1:
        balance, around = _ring(job, training)
        ring = range(sizes[CONTEXT])
        for half in (0, 1):
            pairs = make.pairs(CONTEXT, [home_of(2 * i + half, len(ring)) for i in ring])
            yield from make("collective-permute", (CONTEXT,), balance / 2, layers, pairs)
        pairs = make.pairs(CONTEXT, [(i + 1) % len(ring) for i in ring])
        yield from make("collective-permute", (CONTEXT,), around, layers, pairs)
    if training:
        shards = math.prod(sizes[a] for a in (*WEIGHTS, TENSOR))
        gradient = (
            c.num_hidden_layers * adapter_parameters(c) if c.lora else c.num_parameters
        ) / shards
        for axis in _REPLICAS:
            yield from make("all-reduce", (axis,), gradient * BYTES[c.param_dtype])


def _ring(job: Job, training: bool) -> tuple[float, float]:
    """Bytes that a device sends in one layer of ``model/ring.py``: to share the work out evenly
    and back, and around the ring."""
    c, n = job.model, job.mesh.context
    tokens, wide = _tokens(job), BYTES[c.dtype]
    queries = tokens * c.num_attention_heads * c.head_dim / job.mesh.tensor * wide
    keys = 2 * tokens * c.num_key_value_heads * c.head_dim / job.mesh.tensor * wide
    balance, around = 2 * queries + keys, n * keys
    if not training:
        return balance, around
    again = {"none": (0.0, 0.0), "attention": (queries + keys, 0.0)}.get(c.remat, (balance, around))
    # their gradients travel with keys and values, in float32
    return 2 * balance + again[0], around * (2 + 4 / wide) + again[1]


class _Maker:
    """Collectives among devices of a mesh."""

    def __init__(self, place: Placement, dtype: str) -> None:
        self._place, self._dtype = place, dtype

    def __call__(
        self,
        kind: str,
        axes: tuple[str, ...],
        size: float,
        count: float = 1.0,
        pairs: Groups | None = None,
    ) -> Iterator[Collective]:
        """``count`` of them with ``size`` bytes each; nothing where the axes are of one device.

        ``pairs``: who sends to whom, of a permute.
        """
        place = self._place
        axes = tuple(a for a in axes if place.along([a]) > 1)
        devices = place.along(axes)
        if devices == 1 or not size:
            return
        yield Collective(
            kind=kind,
            dtype=self._dtype,
            axes=axes,
            devices=devices,
            op="",
            dcn=bool(set(axes) & set(place.across_slices)),
            count=count,
            bytes=size * count,
            sent=size * count * SENT[kind](devices),
            groups=(self._group(axes),) if pairs is None else pairs,
        )

    def _group(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The first device's."""
        place = self._place
        spans = [
            range(size) if name in axes else range(1)
            for name, size in zip(place.names, place.sizes, strict=True)
        ]
        return tuple(place.number(at) for at in itertools.product(*spans))

    def pairs(self, axis: str, to: Sequence[int]) -> Groups:
        """Everyone whom ``to`` sends to another along an axis, and that other."""
        place, which = self._place, self._place.names.index(axis)
        out = []
        for device in range(place.count):
            at = list(place.place(device))
            at[which] = to[at[which]]
            out.append((device, place.number(at)))
        return tuple((source, target) for source, target in out if source != target)
