"""Checkpoints come back bit for bit, and a damaged one is never taken for whole."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.errors import InputError
from model.checkpoint import Checkpoints, checksums

# Orbax abandons its other reads when one fails; they complain when they are collected: here, then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def state(small_params):
    """What a training run saves: parameters, an optimizer state, a step, some bfloat16."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": small_params,
        "opt_state": optimizer.init(small_params),
        "step": jnp.int32(7),
        "half": small_params["embed"].astype(jnp.bfloat16),
        "key": jnp.asarray([1, 2**32 - 1], jnp.uint32),
    }


def _shifted(state, by: float):
    return jax.tree.map(lambda a: a + jnp.asarray(by, a.dtype), state)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory) -> Path:
    """A folder with steps 1 and 2, the second shifted by 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, _shifted(state, 1), {"seed": 5})
    checkpoints.save(2, _shifted(state, 2))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def _same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_restored_bit_for_bit(saved, state):
    checkpoints = Checkpoints(saved)
    assert checkpoints.steps() == [1, 2]
    _same(checkpoints.restore(1, state), _shifted(state, 1))
    _same(checkpoints.restore_latest(state), _shifted(state, 2))
    assert checkpoints.meta(1) == {"seed": 5}
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    _same(checkpoints.restore(2, abstract), _shifted(state, 2))
    checkpoints.close()


def test_an_empty_folder_has_nothing_to_resume(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore_latest(state) is None
    with pytest.raises(InputError, match="checkpoint 3 .* does not exist"):
        checkpoints.restore(3, state)
    checkpoints.close()


@pytest.mark.parametrize("background", [False, True])
def test_the_newest_are_kept_and_a_step_can_be_replaced(tmp_path, background):
    checkpoints = Checkpoints(tmp_path, keep=2, background=background)
    for step in (1, 2, 3, 3):
        checkpoints.save(step, {"a": jnp.full(3, step)})
    checkpoints.save(3, {"a": jnp.full(3, 9)})
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.steps() == [2, 3]
    np.testing.assert_array_equal(again.restore(3, {"a": jnp.zeros(3, jnp.int32)})["a"], 9)
    again.close()


def _largest(folder: Path) -> Path:
    """The file that holds most of the arrays."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_refused_and_a_resume_falls_back(folder, state, damage):
    damage(_largest(folder / "2"))
    checkpoints = Checkpoints(folder)
    with pytest.raises(InputError, match=rf"checkpoint 2 in {folder}"):
        checkpoints.restore(2, state)
    with pytest.warns(UserWarning, match="checkpoint 2 .* trying the step before"):
        _same(checkpoints.restore_latest(state), _shifted(state, 1))
    damage(_largest(folder / "1"))
    with pytest.warns(UserWarning), pytest.raises(InputError, match="checkpoint 2"):
        checkpoints.restore_latest(state)
    checkpoints.close()


QUIET = """
import sys
from collections.abc import Iterator
from pathlib import Path
import jax.numpy as jnp
from configs.errors import InputError
from model.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
try:
    checkpoints.restore(2, {"a": jnp.zeros((512, 512))})
except InputError as error:
    print(error)
"""


def test_a_truncated_checkpoint_is_one_line_and_no_traceback(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)
    for step in (1, 2):
        checkpoints.save(step, {"a": noise})
    checkpoints.close()
    _truncate(_largest(tmp_path / "2"))
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith(f"checkpoint 2 in {tmp_path} is damaged")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_another_shape_is_refused(saved, state):
    checkpoints = Checkpoints(saved)
    wider = state | {"half": jnp.zeros((102, 32), jnp.bfloat16)}
    more = state | {"extra": jnp.zeros(3)}
    for other in (wider, more):
        with pytest.raises(InputError, match="checkpoint 2"):
            checkpoints.restore(2, other)
    checkpoints.close()


def test_a_checksum_sees_one_bit_and_an_exchange(state):
    a = jnp.arange(8, dtype=jnp.float32)
    assert checksums([a]) != checksums([a.at[0].set(-0.0)])  # equal as numbers
    assert checksums([a]) != checksums([a[::-1]])
    assert checksums([a]) == checksums([np.arange(8, dtype=np.float32)])
