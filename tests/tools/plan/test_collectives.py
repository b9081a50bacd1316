"""Every collective of the compiled training step, on the meshes that matter, and nothing else.

A step is written with its collectives in the open (``model/parallel.py``); this is what the
compiler makes of them. A row more in a table below is a cost that somebody has added: know why.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("libtpu")

import jax

from model.config import Qwen3Config
from model.sharding import MeshConfig, make_mesh
from sft.learner import OptimizerConfig
from tools.plan.compiling import OutOfMemory, compile_to_text
from tools.plan.expected import expected
from tools.plan.hlo import Program, analyse
from tools.plan.job import Job
from tools.plan.programs import STEP, programs
from tools.plan.topology import devices, placement

LAYERS, MICROBATCHES = 3, 2
MODEL = Qwen3Config(  # every width a multiple of 128 on every device
    vocab_size=20_480,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    dtype="bfloat16",
    remat="full",
    attention="splash",
)


def job(topology: str, **axes: int) -> Job:
    attention = "context" if "context" in axes else "splash"
    return Job(
        model=replace(MODEL, attention=attention),
        mesh=MeshConfig(topology=topology, **axes),
        rows=16 * MICROBATCHES,
        microbatch_rows=16,
        tokens=4096 if "context" in axes else 1024,
        targets=0,
        optimizer=OptimizerConfig(),
    )


@pytest.fixture
def optimised():
    """What a job's step is optimised to, without the minute that generating code takes.

    libtpu stops in between where memory does not suffice, so it is given none. It must then not
    try to save any: it would compute more again, and gather for that.
    """
    before = jax.config.jax_memory_fitting_level
    jax.config.update("jax_memory_fitting_level", "O0")

    def run(job: Job) -> Program:
        job.check()
        mesh = make_mesh(job.mesh, devices(job.slice))
        step = next(p for p in programs(job, mesh) if p.name == STEP)
        with pytest.raises(OutOfMemory) as stopped:
            compile_to_text(step.lowered, xla_tpu_max_hbm_size_mib=1)
        return analyse(stopped.value.text, placement(mesh, job.slice), step.loops)

    yield run
    jax.config.update("jax_memory_fitting_level", before)


LAYER = LAYERS * MICROBATCHES
FORWARD, AGAIN, BACKWARD = "layer", "layer, made again", "layer, backward"
HEAD, HEAD_BACKWARD = "chunk of the head", "chunk of the head, backward"
ENDS, ENDS_BACKWARD = "microbatch", "microbatch, backward"
ONCE = "step"


def where(op: str) -> str:
    """The place of the program that a path of JAX's primitives is."""
    back = "transpose(" in op
    if "token_logprobs" in op and "while/" in op.partition("token_logprobs")[2] + "/":
        return HEAD_BACKWARD if back else HEAD
    inside = op.removeprefix("while/").removeprefix("transpose(jvp())/")
    if op.startswith("while/") and (inside == "while" or inside.startswith("while/")):
        return (AGAIN if "rematted" in op else BACKWARD) if back else FORWARD
    if op.startswith("while"):
        return ENDS_BACKWARD if back else ENDS
    return ONCE


def table(program: Program, chunks: int) -> dict[tuple, float]:
    """Executions by (place, kind, axes), each in the number of times that its place is come by."""
    passes = dict.fromkeys((FORWARD, AGAIN, BACKWARD), LAYER)
    passes |= dict.fromkeys((HEAD, HEAD_BACKWARD), MICROBATCHES * chunks)
    passes |= {ENDS: MICROBATCHES, ENDS_BACKWARD: MICROBATCHES, ONCE: 1}
    found: Counter[tuple] = Counter()
    for row in program.collectives:
        axes = "+".join(row.axes) + ("/dcn" if row.dcn else "")
        found[where(row.op), row.kind, axes] += row.count / passes[where(row.op)]
    return dict(found)


MATRICES = 7  # q, k, v, o, gate, up, down


def test_fsdp(optimised):
    """Matrices travel to where rows are, and their gradients back."""
    found = optimised(job("v5e:2x4", fsdp=8))
    assert table(found, chunks=3) == {
        # each matrix whole before it is used, and again in the backward pass: it is never kept
        (FORWARD, "all-gather", "fsdp"): MATRICES,
        (AGAIN, "all-gather", "fsdp"): MATRICES,
        # the sum of its gradient, each device its part
        (BACKWARD, "reduce-scatter", "fsdp"): MATRICES,
        # the same for the head, a chunk of the vocabulary at a time
        (HEAD, "all-gather", "fsdp"): 1,
        (HEAD_BACKWARD, "all-gather", "fsdp"): 1,
        (HEAD_BACKWARD, "reduce-scatter", "fsdp"): 1,
        # embeddings: ids go to all, channels come back, and their gradients go
        (ENDS, "all-gather", "fsdp"): 1,
        (ENDS, "all-to-all", "fsdp"): 1,
        (ENDS_BACKWARD, "all-to-all", "fsdp"): 1,
        # tokens and loss; gradients of norms with the squares of all for the clipping
        (ONCE, "all-reduce", "fsdp"): 2,
    }


def test_fsdp_and_tensor(optimised):
    """Besides, tokens are gathered before the products that a tensor group shares."""
    found = optimised(job("v5e:2x4", fsdp=4, tensor=2))
    assert table(found, chunks=2) == {
        (FORWARD, "all-gather", "fsdp"): MATRICES,
        (AGAIN, "all-gather", "fsdp"): MATRICES,
        (BACKWARD, "reduce-scatter", "fsdp"): MATRICES,
        # tokens before q, k, v and before gate, up; their sums after o and after down
        (FORWARD, "all-gather", "tensor"): 2,
        (FORWARD, "reduce-scatter", "tensor"): 2,
        # both again, but nobody needs what came out of down
        (AGAIN, "all-gather", "tensor"): 2,
        (AGAIN, "reduce-scatter", "tensor"): 1,
        # and the derivatives of all four
        (BACKWARD, "all-gather", "tensor"): 2,
        (BACKWARD, "reduce-scatter", "tensor"): 2,
        (HEAD, "all-gather", "fsdp"): 1,
        (HEAD_BACKWARD, "all-gather", "fsdp"): 1,
        (HEAD_BACKWARD, "reduce-scatter", "fsdp"): 1,
        # embeddings: the ids of all tokens in two steps; a sum over parts of the vocabulary
        (ENDS, "all-gather", "fsdp"): 1,
        (ENDS, "all-to-all", "fsdp"): 1,
        (ENDS_BACKWARD, "all-to-all", "fsdp"): 1,
        (ENDS, "all-gather", "tensor"): 2,  # ids, and the last hidden states for the head
        (ENDS_BACKWARD, "all-gather", "tensor"): 1,
        (ENDS_BACKWARD, "reduce-scatter", "tensor"): 1,
        # the logits' largest, and their sums; and what should be a reduce-scatter, of the last
        # hidden states' gradient, is summed whole
        (ENDS, "all-reduce", "tensor"): 3,
        (ONCE, "all-reduce", "fsdp"): 1,
        (ONCE, "all-reduce", "fsdp+tensor"): 2,
    }


def test_fsdp_context_and_tensor(optimised):
    """Besides, keys and values travel around a ring; matrices are split over both axes."""
    found = optimised(job("v5e:4x4", fsdp=2, context=4, tensor=2))
    both = "fsdp+context"
    assert table(found, chunks=2) == {
        (FORWARD, "all-gather", both): MATRICES,
        (AGAIN, "all-gather", both): MATRICES,
        (BACKWARD, "reduce-scatter", both): MATRICES,
        (FORWARD, "all-gather", "tensor"): 2,
        (FORWARD, "reduce-scatter", "tensor"): 2,
        (AGAIN, "all-gather", "tensor"): 2,
        (AGAIN, "reduce-scatter", "tensor"): 1,
        (BACKWARD, "all-gather", "tensor"): 2,
        (BACKWARD, "reduce-scatter", "tensor"): 2,
        # both halves of q, k, v and, back, of the result, so that all do the same work under the
        # causal mask; k and v four times to the next, the last time for nothing
        (FORWARD, "collective-permute", "context"): 8 + 8,
        # the same, and segment ids around with them
        (AGAIN, "collective-permute", "context"): 8 + 8 + 4,
        # the derivatives of the halves; k, v and ids around (the first time was made above), and
        # with them dk and dv, which then go home; two seams as on fsdp alone
        (BACKWARD, "collective-permute", "context"): 8 + 6 + 3 + 8,
        # ids in the forward pass, once for all layers: both halves, then around
        (ENDS, "collective-permute", "context"): 2 + 4,
        (HEAD, "all-gather", both): 1,
        (HEAD_BACKWARD, "all-gather", both): 1,
        (HEAD_BACKWARD, "reduce-scatter", both): 1,
        (ENDS, "all-gather", both): 1,
        (ENDS, "all-to-all", both): 1,
        (ENDS_BACKWARD, "all-to-all", both): 1,
        (ENDS, "all-gather", "tensor"): 2,
        (ENDS_BACKWARD, "all-gather", "tensor"): 1,
        (ENDS_BACKWARD, "reduce-scatter", "tensor"): 1,
        (ENDS, "all-reduce", "tensor"): 3,
        (ONCE, "all-reduce", both): 1,
        (ONCE, "all-reduce", f"{both}+tensor"): 2,
    }


def test_slices(optimised):
    """Slices meet once a step, with gradients that are summed within a slice already."""
    found = optimised(job("2xv5e:2x4", slice=2, fsdp=8))
    rows = table(found, chunks=3)
    between = {key: count for key, count in rows.items() if key[2].endswith("/dcn")}
    # seven matrices, the embedding and the head; norms, tokens and metrics
    assert between == {(ONCE, "all-reduce", "slice/dcn"): 9 + 5}
    sent = sum(row.sent for row in found.collectives if row.dcn)
    gradients = 4 * MODEL.num_parameters / 8
    assert sent == pytest.approx(gradients, rel=1e-3)  # 2 (n - 1) / n of them, n = 2
    # vectors that all sixteen sum: within the slice first, each device a part
    assert rows.pop((ONCE, "all-gather", "fsdp")) == 4
    assert rows.pop((ONCE, "all-reduce", "fsdp")) == 2
    alone = table(optimised(job("v5e:2x4", fsdp=8)), chunks=3)
    alone.pop((ONCE, "all-reduce", "fsdp"))
    # the derivative of the embedding's exchange loses its name on the way to this program
    turned = alone.pop((ENDS_BACKWARD, "all-to-all", "fsdp"))
    alone[ENDS, "all-to-all", "fsdp"] += turned
    again = alone.pop((AGAIN, "all-gather", "fsdp"))
    alone[BACKWARD, "all-gather", "fsdp"] = again
    assert {key: n for key, n in rows.items() if key not in between} == alone


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5e:2x4", {"fsdp": 8}),
        ("v5e:2x4", {"fsdp": 4, "tensor": 2}),
        ("v5e:4x4", {"fsdp": 2, "context": 4, "tensor": 2}),
        ("2xv5e:2x4", {"slice": 2, "fsdp": 8}),
    ],
)
def test_the_formulas_say_the_same_bytes(optimised, topology, axes):
    """Those that rank what is not compiled."""
    wanted = job(topology, **axes)
    made = optimised(wanted)
    mesh = make_mesh(wanted.mesh, devices(wanted.slice))
    guess = expected(wanted, placement(mesh, wanted.slice))[STEP]
    assert guess.flops == pytest.approx(made.flops, rel=1e-3)
    assert guess.sent == pytest.approx(sum(row.sent for row in made.collectives), rel=0.04)
