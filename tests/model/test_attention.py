"""attend() against attention written out, values and gradients."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import InputError
from model import attention
from model.attention import attend, check

B, T, H, K, HD = 2, 21, 4, 2, 6
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 4, [1] * 21], np.int32)


def _written_out(q, k, v, segments):
    """Head by head, query by query; no blocks, no grouping."""
    (b, t, h, hd), kv = q.shape, k.shape[2]
    index = jnp.arange(t)
    visible = index[:, None] >= index[None, :]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    visible = jnp.broadcast_to(visible, (b, t, t))
    heads = []
    for i in range(h):
        scores = jnp.einsum("btd,bsd->bts", q[:, :, i], k[:, :, i // (h // kv)]) / hd**0.5
        p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        heads.append(jnp.einsum("bts,bsd->btd", p, v[:, :, i // (h // kv)]))
    return jnp.concatenate(heads, -1)


@pytest.mark.parametrize("block", [8, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(monkeypatch, block, packed):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    keys = jax.random.split(jax.random.key(0), 4)
    q = 2 * jax.random.normal(keys[0], (B, T, H, HD))
    k, v = (jax.random.normal(key, (B, T, K, HD)) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], (B, T, H * HD))
    segments = jnp.asarray(SEGMENTS) if packed else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *qkv):
        out, pull = jax.vjp(lambda *x: function(*x, segments), *qkv)
        return out, *pull(cotangent)

    for ours, golden in zip(run(attend, q, k, v), run(_written_out, q, k, v), strict=True):
        np.testing.assert_allclose(ours, golden, atol=1e-5)


class Case(NamedTuple):
    b: int
    t: int
    h: int
    k: int
    hd: int
    dtype: str = "float32"
    packed: bool = True


CASES = [
    Case(2, 150, 4, 2, 16),
    Case(1, 300, 2, 1, 128, "bfloat16"),
    Case(2, 300, 2, 2, 16, packed=False),
]


def agrees(impl: str, case: Case) -> None:
    """attend by ``impl`` is attention written out, and so are its gradients of q, k and v.

    And between the passes it keeps nothing of the size of the probabilities.
    """
    b, t, h, kv, hd, dtype, packed = case
    dtype = "bfloat16" if impl == "cudnn" else dtype
    rng = np.random.default_rng(0)
    shapes = [(b, t, h, hd), (b, t, kv, hd), (b, t, kv, hd), (b, t, h * hd)]
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    # uneven segments, one of them twice in a row
    segments = jnp.asarray(rng.choice(4, (b, 6)).repeat([1, 40, 7, 70, 2, t - 120], 1), jnp.int32)
    segments = segments if packed else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, q, k, v, segments, cotangent):
        out, pull = jax.vjp(lambda *x: function(*x, segments), q, k, v)
        kept = max(x.size for x in jax.tree.leaves(pull)) if function is not _written_out else 0
        assert kept < b * h * t * t, kept
        return out, *pull(cotangent)

    ours = run(functools.partial(attend, impl=impl), q, k, v, segments, cotangent)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    golden = run(_written_out, *wide, segments, cotangent.astype(jnp.float32))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, golden, strict=True):
        assert a.dtype == dtype
        tolerance = 2e-5 if dtype == "float32" else 2e-2
        a, b = np.asarray(a, np.float32), np.asarray(b)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(), err_msg=f"{name} of {case}"
        )


CONTEXT = """
import jax
from jax.sharding import AxisType
from model.sharding import simulate_devices
simulate_devices(4)
from model import ring
from test_attention import CASES, agrees
ring.BLOCK = 16
for axes, case in zip(({"context": 4}, {"context": 3}, {"data": 2, "context": 2}), CASES):
    devices = jax.devices()[:3] if axes == {"context": 3} else jax.devices()
    types = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)
    with jax.set_mesh(mesh):
        agrees("context", case)
print("ok")
"""


@pytest.mark.parametrize("impl", ["xla", "splash", "cudnn", "context"])
def test_every_implementation_computes_the_same(impl):
    try:
        check(impl)
    except InputError as error:
        pytest.skip(str(error))
    if impl != "context":
        for case in CASES:
            agrees(impl, case)
        return
    here = Path(__file__).parent  # in a process of its own: it needs several devices
    done = subprocess.run(
        [sys.executable, "-c", CONTEXT],
        env={
            "PYTHONPATH": f"{here.parent.parent}:{here}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # nearly all the time is compilation
            "HOME": "/tmp",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_what_cannot_run_here_is_refused_in_one_line():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(InputError, match="mesh with an axis 'context'.* here is no mesh$"):
        attend(q, q, q, None, "context")
    if jax.default_backend() == "cpu":
        with pytest.raises(InputError, match=r"needs an NVIDIA GPU, JAX has \d+ cpu device"):
            attend(q, q, q, None, "cudnn")


def test_a_program_for_a_tpu_holds_the_kernel():
    """Traced on any machine: the mesh says what it is for."""
    q = jax.ShapeDtypeStruct((1, 130, 2, 8), jnp.bfloat16)
    traced = jax.jit(functools.partial(attend, segments=None, impl="splash")).trace
    assert "tpu_custom_call" not in traced(q, q, q).lower().as_text()
    device = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = traced(q, q, q).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
