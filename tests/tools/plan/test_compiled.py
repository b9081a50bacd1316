"""Programs compiled for TPUs that are not here, against counts made by hand."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("libtpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs.errors import InputError
from model.splash import splash_attend
from tools.plan.chips import parse
from tools.plan.compiling import compile_to_text
from tools.plan.hlo import Program, analyse
from tools.plan.topology import devices, placement

P = PartitionSpec


def mesh(name: str, *order: int, **axes: int) -> Mesh:
    """A mesh over a slice's devices; ``order`` numbers them otherwise."""
    found = np.array(devices(parse(name)))
    if order:
        found = found[list(order)]
    kinds = (AxisType.Auto,) * len(axes)
    return Mesh(found.reshape(tuple(axes.values())), tuple(axes), axis_types=kinds)


def count(function, on: Mesh, name: str, *arguments: tuple, **options) -> Program:
    """The counts of a function of arrays (shape, spec[, dtype])."""
    shapes = [
        jax.ShapeDtypeStruct(shape, *dtype or (jnp.bfloat16,), sharding=NamedSharding(on, spec))
        for shape, spec, *dtype in arguments
    ]
    with jax.set_mesh(on):
        _, text = compile_to_text(jax.jit(function).lower(*shapes))
    return analyse(text, placement(on, parse(name)), **options)


@pytest.fixture(scope="module")
def flat() -> Mesh:
    return mesh("v5e:2x4", a=2, b=4)


def test_products_in_nested_loops(flat):
    def run(x, ws):
        def outer(x, w):
            return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0], None

        return lax.scan(outer, x, ws)[0]

    found = count(run, flat, "v5e:2x4", ((1024, 512), P()), ((5, 512, 512), P()))
    assert found.matmul_flops == 15 * 2 * 1024 * 512 * 512
    assert sorted(trips for _, trips in found.loops) == [3, 5]
    assert not found.collectives
    # each matrix is read once; what stays on the chip between products is the compiler's choice
    assert found.hbm_bytes >= 2 * (5 * 512 * 512 + 2 * 1024 * 512)


@pytest.mark.parametrize(
    ("form", "left", "right", "flops"),
    [
        ("bhtd,bhsd->bhts", (3, 5, 256, 128), (3, 5, 384, 128), 3 * 5 * 256 * 384 * 128),
        ("bthd,bshd->bhts", (3, 256, 5, 128), (3, 384, 5, 128), 3 * 5 * 256 * 384 * 128),
        ("bthd,bthe->bhde", (3, 256, 5, 128), (3, 256, 5, 64), 3 * 5 * 256 * 128 * 64),
        ("td,sd->ts", (256, 128), (384, 128), 256 * 384 * 128),
    ],
)
def test_batched_products(flat, form, left, right, flops):
    """XLA makes batch dimensions spatial ones of a convolution, with a window full of holes."""
    found = count(lambda x, y: jnp.einsum(form, x, y), flat, "v5e:2x4", (left, P()), (right, P()))
    assert found.matmul_flops == 2 * flops


def test_the_gradient_of_an_mlp_with_recomputation(flat):
    layers, tokens, d, f = 4, 1024, 512, 2048

    def loss(ws, x):
        def layer(x, w):
            return x + jax.nn.silu(x @ w[0]) @ w[1], None

        return (lax.scan(jax.checkpoint(layer), x, ws)[0].astype(jnp.float32) ** 2).sum()

    def run(up, down, x):
        return jax.grad(loss)((up, down), x)

    found = count(
        run, flat, "v5e:2x4", ((layers, d, f), P()), ((layers, f, d), P()), ((tokens, d), P())
    )
    # forward 2, backward 4, and the first again: the second one's result is not needed
    assert found.matmul_flops == layers * 7 * 2 * tokens * d * f


@pytest.mark.parametrize("order", [(), (3, 1, 4, 0, 5, 2, 7, 6)])
def test_collectives_by_axis(order):
    """Bytes as tools/plan/hlo.py has them; in which order the devices lie changes nothing."""
    on = mesh("v5e:2x4", *order, a=2, b=4)

    def run(x, w):
        def local(x, w):
            y = x @ lax.all_gather(w, "b", axis=0, tiled=True)
            y = lax.psum_scatter(y, "a", scatter_dimension=0, tiled=True)
            y = lax.ppermute(y, "b", [(i, (i + 1) % 4) for i in range(4)])
            z = lax.all_to_all(y, "b", 0, 1, tiled=True)
            everywhere = lax.all_gather(z, ("a", "b"), axis=0, tiled=True)
            return lax.psum(z, ("a", "b")), lax.psum(everywhere * 2, "b")

        return jax.shard_map(
            local, mesh=on, in_specs=(P(), P("b")), out_specs=(P(), P()), check_vma=False
        )(x, w)

    found = count(run, on, "v5e:2x4", ((1024, 1024), P()), ((1024, 512), P("b")))
    assert found.matmul_flops == 2 * 1024 * 1024 * 512
    mib = 2**20
    rows = {(row.kind, row.axes): row for row in found.collectives}
    assert {key: row.sent for key, row in rows.items()} == {
        ("all-gather", ("b",)): 3 / 4 * mib,  # [1024, 512] bf16
        ("reduce-scatter", ("a",)): 1 / 2 * mib,
        ("collective-permute", ("b",)): mib / 2,  # [512, 512]
        ("all-to-all", ("b",)): 3 / 4 * mib / 2,
        ("all-gather", ("a", "b")): 7 / 8 * 8 * mib / 2,
        ("all-reduce", ("a", "b")): 2 * 7 / 8 * mib / 2,
        ("all-reduce", ("b",)): 2 * 3 / 4 * 4 * mib,
    }
    assert all(row.count == 1 and row.dtype == "bf16" for row in found.collectives)
    assert rows["all-gather", ("b",)].op == "all_gather"
    assert rows["collective-permute", ("b",)].devices == 4


def test_collectives_hidden_behind_products_count_once():
    """XLA spreads some over several fusions (asynchronous) and makes others of parts."""
    layers, d, f, t = 4, 2048, 8192, 1024
    on = mesh("v5e:4x4", fsdp=4, tensor=4)

    def layer(x, w):
        up = lax.all_gather(w[0], "fsdp", axis=0, tiled=True)
        down = lax.all_gather(w[1], "fsdp", axis=1, tiled=True)
        y = jax.nn.silu(lax.all_gather(x, "tensor", axis=1, tiled=True) @ up) @ down
        return x + lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True), None

    def local(up, down, x):
        def loss(ws):
            y, _ = lax.scan(jax.checkpoint(layer), x, ws)
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)((up, down))

    specs = (P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"), P("fsdp", "tensor"))
    run = jax.shard_map(local, mesh=on, in_specs=specs, out_specs=specs[:2], check_vma=False)
    shapes = ((layers, d, f), (layers, f, d), (8, t, d))
    found = count(run, on, "v5e:4x4", *zip(shapes, specs, strict=True))

    assert found.matmul_flops == layers * 7 * 2 * (2 * t) * d * (f // 4)
    sent: dict = {}
    for row in found.collectives:
        sent[row.kind, row.axes] = sent.get((row.kind, row.axes), 0) + row.sent
    weight, tokens = d * (f // 4) * 2, 2 * t * d * 2
    # both matrices forward and backward; x forward, again, and y's gradient
    assert sent["all-gather", ("fsdp",)] == layers * 4 * 3 / 4 * weight
    assert sent["all-gather", ("tensor",)] == layers * 3 * 3 / 4 * tokens
    assert sent["reduce-scatter", ("tensor",)] == layers * 2 * 3 / 4 * tokens
    # the compiler pads one of the two gradients and mends the seams by a permute
    assert sent["reduce-scatter", ("fsdp",)] == pytest.approx(layers * 2 * 3 / 4 * weight, rel=0.02)
    assert set(sent) <= {
        *(
            (kind, (axis,))
            for kind in ("all-gather", "reduce-scatter")
            for axis in ("fsdp", "tensor")
        ),
        ("collective-permute", ("fsdp",)),
    }


def test_a_gather_over_a_whole_cube_becomes_an_all_reduce():
    """XLA:TPU has gathers along one dimension of a torus, and reductions along three."""
    on = mesh("v5p:4x4x4", fsdp=64)

    def local(w):
        return lax.all_gather(w, "fsdp", axis=0, tiled=True).sum(0)

    run = jax.shard_map(local, mesh=on, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    found = count(run, on, "v5p:4x4x4", ((5120, 8192), P("fsdp")))
    (row,) = found.collectives
    assert (row.kind, row.axes) == ("all-reduce", ("fsdp",))
    assert row.op in ("all_gather", "")  # libtpu 0.0.42 forgets where it came from
    assert row.sent == 2 * 63 / 64 * 5120 * 8192 * 2
    assert ["made this gather an all-reduce" in n for n in found.notes] == [True] * bool(row.op)


@pytest.mark.parametrize("length", [1024, 4096])
def test_splash_attention(flat, length):
    """Tiles of 512 that reach the diagonal: two products forward, three for dq, four for dk, dv."""
    b, h, k, hd = 4, 8, 4, 128
    split = P("a", None, "b")

    def run(q, k, v, segments):
        attend = jax.shard_map(
            splash_attend,
            mesh=flat,
            in_specs=(split, split, split, P("a")),
            out_specs=split,
            check_vma=False,
        )
        return jax.grad(lambda *qkv: attend(*qkv, segments).astype(jnp.float32).sum(), (0, 1, 2))(
            q, k, v
        )

    q, kv = ((b, length, heads, hd) for heads in (h, k))
    found = count(
        run, flat, "v5e:2x4", (q, split), (kv, split), (kv, split), ((b, length), P("a"), jnp.int32)
    )
    rows = length // 512
    tiles = (b // 2) * (h // 4) * rows * (rows + 1) // 2
    assert found.attention_flops == tiles * (2 + 3 + 4) * 2 * 512 * 512 * hd
    assert found.matmul_flops == 0
    assert not found.notes


def test_a_loop_that_depends_on_data(flat):
    def run(x, w, n):
        return lax.fori_loop(0, n, lambda _, x: x @ w, x)

    arguments = ((512, 512), P()), ((512, 512), P()), ((), P(), jnp.int32)
    with pytest.raises(InputError, match=r"jit\(run\)/while"):
        count(run, flat, "v5e:2x4", *arguments)
    found = count(run, flat, "v5e:2x4", *arguments, loops={"jit(run)/while": 6})
    assert found.matmul_flops == 6 * 2 * 512**3


def test_the_dearest_branch(flat):
    def run(p, x, w):
        return lax.cond(p, lambda: x @ w @ w, lambda: x @ w)

    found = count(run, flat, "v5e:2x4", ((), P(), jnp.bool_), ((512, 512), P()), ((512, 512), P()))
    assert found.matmul_flops == 2 * 2 * 512**3
    assert ["dearest branch" in note for note in found.notes] == [True]


def test_slices_are_read_and_updated_in_place(flat):
    """A loop that reads one page of an array and writes one of another, 64 times."""
    pages, size = 64, 1024 * 1024

    def run(x):
        def body(i, out):
            page = lax.dynamic_index_in_dim(x, i, keepdims=False)
            return lax.dynamic_update_index_in_dim(out, jnp.tanh(page), i, 0)

        return lax.fori_loop(0, pages, body, jnp.zeros_like(x))

    found = count(run, flat, "v5e:2x4", ((pages, 1024, 1024), P(), jnp.float32))
    once = pages * size * 4
    # zeros are written, then each page is read and written once; not all pages 64 times
    assert 2 * once <= found.hbm_bytes <= 4 * once


@pytest.mark.parametrize("inner", ["slice", "fsdp"])
def test_collectives_between_slices(inner):
    """The hosts carry them: they are told apart, and named by the axis that crosses slices."""
    name = "2xv5e:2x4"
    found = np.array(devices(parse(name))).reshape(2, 8)
    axes = ("slice", "fsdp") if inner == "fsdp" else ("fsdp", "slice")
    on = Mesh(found if inner == "fsdp" else found.T, axes, axis_types=(AxisType.Auto,) * 2)

    def local(x):
        return lax.psum(lax.psum_scatter(x, "fsdp", tiled=True), "slice")

    run = jax.shard_map(local, mesh=on, in_specs=P(axes), out_specs=P("fsdp"), check_vma=False)
    result = count(run, on, name, ((16 * 1024, 512), P(axes)))
    mine = 1024 * 512 * 2
    assert {(r.kind, r.axes, r.dcn): r.sent for r in result.collectives} == {
        ("reduce-scatter", ("fsdp",), False): 7 / 8 * mine,
        ("all-reduce", ("slice",), True): 2 * 1 / 2 * mine / 8,
    }
    assert placement(on, parse(name)).across_slices == ("slice",)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v6e:2x4", "v7x:2x2x1"])
def test_devices_are_as_the_table_says(name):
    wanted = parse(name)
    found = devices(wanted)
    assert len(found) == wanted.devices
    assert {d.device_kind for d in found} == {wanted.chip.kind}
    assert math.prod(wanted.shape) * wanted.chip.per_chip == len(
        {(*d.coords, d.core_on_chip) for d in found}
    )


def test_a_shape_that_there_is_not():
    with pytest.raises(InputError, match="v5e:3x5"):
        devices(parse("v5e:3x5"))
