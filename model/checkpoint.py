"""Training checkpoints in Orbax: atomic, pruned, restored bit for bit.

A checkpoint is a tree of arrays (parameters, optimizer state, step, ...) plus a little JSON. Orbax
writes each step aside and renames it, so that a killed run leaves a whole step or none. Beside it
lie the sizes of its files, compared before anything is read (Orbax notices a missing or truncated
file too, but late and with a page of tracebacks), and a checksum of every array, since it does not
notice a flipped bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.errors import InputError
from configs.files import write_atomic
from model.hosts import host_index

FILES = "files.json"  # in a step's folder: {path: bytes} of everything else in it


class Checkpoints:
    """The checkpoints of one run, one folder per step.

    Args:
        folder: created if missing; a path on disk or in object storage.
        keep: newest steps to keep; at least 2, so that a damaged newest leaves something.
        best: steps with the highest score to keep besides.
        background: write while training goes on; ``close`` waits for the last write.
    """

    def __init__(
        self, folder: Path, keep: int = 2, *, best: int = 0, background: bool = False
    ) -> None:
        import orbax.checkpoint as ocp  # imported late: it takes seconds
        from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

        self._ocp, self._folder, self._background = ocp, Path(folder).absolute(), background
        newest = preserve.LatestN(max(keep, 2))
        self._scores: dict[int, float] = {}
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserve.AnyPreservationPolicy(
                    [newest, _Best(best, self._scores)]
                ),
                enable_async_checkpointing=background,
                create=True,
            ),
        )
        if best:
            self._scores.update(self._read_scores())

    def save(
        self,
        step: int,
        tree: Mapping[str, Any],
        meta: Mapping[str, Any] | None = None,
        *,
        score: float | None = None,
    ) -> None:
        """Write ``tree`` and JSON ``meta`` as ``step``; a step that exists is replaced.

        ``score``, the higher the better, decides which steps count as the best.
        """
        self._manager.wait_until_finished()
        self._list_files()
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = float(score)
        self._manager.save(
            step,
            args=self._ocp.args.Composite(
                tree=self._ocp.args.StandardSave(dict(tree)),
                meta=self._ocp.args.JsonSave(
                    {
                        "meta": dict(meta or {}),
                        "checksums": checksums(dict(tree)),
                        "score": score,
                    }
                ),
            ),
        )

        if not self._background:
            self._list_files()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step on disk with the highest score, the newest of several; None without scores."""
        self._manager.wait_until_finished()  # a step under way is listed, and cannot be read yet
        scored = [(score, step) for step, score in self._read_scores().items()]
        return max(scored)[1] if scored else None

    def _read_scores(self) -> dict[int, float]:
        """Of the steps on disk that have one; a damaged step has none."""
        args = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        found = {}
        for step in self.steps():
            try:
                score = self._manager.restore(step, args=args).meta.get("score")
            except Exception as error:  # orbax and tensorstore each raise their own
                warnings.warn(f"checkpoint {step} has no score: {error}", stacklevel=2)
                continue
            if score is not None:
                found[step] = float(score)
        return found

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """The tree of one step, with the shapes, dtypes and shardings of ``like``.

        Args:
            like: a tree of arrays or jax.ShapeDtypeStruct with the structure that was saved.

        Raises InputError naming step and folder if it is missing, damaged or of another shape.
        """
        where = f"checkpoint {step} in {self._folder}"
        if step not in self._manager.all_steps():
            raise InputError(f"{where} does not exist")
        want = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, dict(like))
        self._check_files(step, where)
        args = self._ocp.args
        try:
            found = self._manager.restore(
                step, args=args.Composite(tree=args.StandardRestore(want), meta=args.JsonRestore())
            )
        except Exception as error:  # orbax, tensorstore and zarr each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{where} cannot be read: {reason[:160]}") from error
        tree, expected = found.tree, found.meta.get("checksums")
        leaves = jax.tree.leaves(tree)
        for (path, spec), leaf in zip(
            jax.tree_util.tree_leaves_with_path(want), leaves, strict=True
        ):
            if leaf.shape != spec.shape or leaf.dtype != spec.dtype:
                raise InputError(
                    f"{where}: {jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, "
                    f"the run asks for {spec.dtype}{list(spec.shape)}"
                )
        if expected is None:
            warnings.warn(f"{where} carries no checksums: restored unchecked", stacklevel=2)
        elif checksums(tree) != expected:
            raise InputError(f"{where} is corrupt: its arrays do not match their checksums")
        return tree

    def restore_latest(self, like: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest tree that can be read, or None if there are no checkpoints.

        A newest step that is damaged is skipped with a warning, for the one before it: a resumed
        run then repeats some steps. Raises InputError if there are steps and none can be read.
        """
        failure: InputError | None = None
        for step in reversed(self.steps()):
            try:
                return self.restore(step, like)
            except InputError as error:
                warnings.warn(f"{error}; trying the step before it", stacklevel=2)
                failure = failure or error
        if failure is not None:
            raise failure
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        args = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        return dict(self._manager.restore(step, args=args).meta.get("meta", {}))

    def close(self) -> None:
        """Wait for writes under way and release the folder."""
        self._manager.wait_until_finished()
        self._list_files()
        self._manager.close()

    def _list_files(self) -> None:
        """Write the sizes of the files of every finished step that has no list of them yet."""
        if host_index() != 0:
            return
        for step in self._manager.all_steps():
            root = self._folder / str(step)
            if not (root / FILES).exists():
                sizes = {str(f.relative_to(root)): f.stat().st_size for f in _files(root)}
                write_atomic(root / FILES, json.dumps(sizes, indent=0))

    def _check_files(self, step: int, where: str) -> None:
        root = self._folder / str(step)
        if not (root / FILES).exists():  # killed between the step's rename and its list
            return
        try:
            sizes = json.loads((root / FILES).read_text())
        except ValueError:
            raise InputError(f"{where} is damaged: {FILES} is not valid JSON") from None
        for name, size in sizes.items():
            path = root / name
            if not path.is_file():
                raise InputError(f"{where} is damaged: {name} is missing")
            if path.stat().st_size != size:
                raise InputError(
                    f"{where} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
                )


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def checksums(tree: Any) -> list[int]:
    """One 32-bit number per array of a tree, in order: sum over i of bits_i * (2 i + 1).

    Computed where the arrays are and the same for every sharding, since integer sums do not depend
    on their order. Odd weights make every change of a single element show.
    """
    return [int(number) for number in jax.device_get(_checksums(jax.tree.leaves(tree)))]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        kind = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).reshape(-1)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


@dataclass(frozen=True)
class _Best:
    """Orbax's rule of what to keep: the `number` steps with the highest scores, the newer of equal
    ones. Its own rule forgets the scores of steps that an earlier process saved."""

    number: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = sorted((self.scores[step], step) for step in steps if step in self.scores)
        best = {step for _, step in scored[max(len(scored) - self.number, 0) :]}
        return [step in best for step in steps]
