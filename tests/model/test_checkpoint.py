"""Checkpoints come back bit for bit, and a damaged one is never taken for whole."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
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


@pytest.mark.parametrize("background", [False, True])
def test_the_best_are_kept_besides_the_newest(tmp_path, background):
    checkpoints = Checkpoints(tmp_path, keep=2, best=2, background=background)
    for step, score in enumerate([0.1, 0.9, 0.3, 0.8, 0.2, None, 0.0]):
        checkpoints.save(step, {"a": jnp.full(3, step)}, score=score)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2, best=2, background=background)
    assert again.steps() == [1, 3, 5, 6]
    assert again.best() == 1
    np.testing.assert_array_equal(again.restore(1, {"a": jnp.zeros(3, jnp.int32)})["a"], 1)
    for step, score in ((7, 0.85), (8, None), (9, 0.1)):  # a process that goes on knows them
        again.save(step, {"a": jnp.full(3, step)}, score=score)
    again.close()
    last = Checkpoints(tmp_path)
    assert last.steps() == [1, 7, 8, 9] and last.best() == 1
    last.close()


def test_the_best_may_be_the_one_that_is_still_being_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best=1, background=True)
    checkpoints.save(1, {"a": jnp.zeros(8)}, score=0.1)
    checkpoints.save(2, {"a": jnp.zeros(4_000_000)}, score=0.9)
    assert checkpoints.best() == 2
    checkpoints.close()


def test_a_background_save_holds_what_was_saved_though_training_goes_on(tmp_path):
    """The learner donates its state, so that the next step may write over it."""
    advance = jax.jit(lambda t: jax.tree.map(lambda a: a * 1.5 + 1, t), donate_argnums=0)
    tree = {"a": jnp.arange(3_000_000, dtype=jnp.float32), "b": jnp.ones((300, 300))}
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    checkpoints, saved = Checkpoints(tmp_path, keep=3, background=True), {}
    for step in range(3):
        saved[step] = jax.tree.map(lambda a: np.array(a, copy=True), tree)
        checkpoints.save(step, tree)
        for _ in range(3):
            tree = advance(tree)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=3)
    for step, want in saved.items():
        _same(again.restore(step, like), want)
    again.close()


MESHES = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
import numpy as np
from model.checkpoint import Checkpoints, checksums
from model.config import preset
from model.qwen3 import init
from model.sharding import make_mesh, param_shardings
config = preset("tiny", vocab_size=64, num_hidden_layers=2)
mesh = make_mesh(eval(sys.argv[3]))
params = jax.device_put(init(config, 0), param_shardings(config, mesh))
checkpoints = Checkpoints(Path(sys.argv[1]))
if not checkpoints.steps():
    checkpoints.save(1, {"params": params})
else:
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params
    )
    got = checkpoints.restore(1, {"params": like})["params"]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
checkpoints.close()
"""


def test_restored_onto_another_mesh_and_device_count(tmp_path):
    """Written by four devices, read by eight laid out otherwise and by one."""
    for devices, mesh in ((4, {"fsdp": 4}), (8, {"data": 2, "fsdp": 4}), (1, {"data": 1})):
        done = subprocess.run(
            [sys.executable, "-c", MESHES, str(tmp_path), str(devices), repr(mesh)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr


SAVES_FOREVER = """
import sys
from pathlib import Path
import jax.numpy as jnp
from model.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), background=True)
for step in range(1, 10_000):
    checkpoints.save(step, {"a": jnp.full((512, 512), step), "b": jnp.full((64, 8), step)})
    print(step, flush=True)
"""


def test_a_save_that_was_cut_off_is_never_restored(tmp_path):
    """Killed at some point of some background save, several times over."""
    like = {"a": jnp.zeros((512, 512), jnp.int32), "b": jnp.zeros((64, 8), jnp.int32)}
    for turn in range(3):
        worker = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOREVER, str(tmp_path / str(turn))],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert worker.stdout is not None
        for _ in range(3 + turn):
            worker.stdout.readline()
        time.sleep(0.013 * turn)
        worker.kill()
        worker.wait()
        worker.stdout.close()
        checkpoints = Checkpoints(tmp_path / str(turn))
        newest = checkpoints.steps()[-1]
        tree = checkpoints.restore(newest, like)
        assert (np.asarray(tree["a"]) == newest).all() and (np.asarray(tree["b"]) == newest).all()
        checkpoints.close()


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
