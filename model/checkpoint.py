"""Training checkpoints in Orbax: atomic, pruned, restored bit for bit.

A checkpoint is a tree of arrays (parameters, optimizer state, step, ...) plus a little JSON. Orbax
writes each step aside and renames it, so that a killed run leaves a whole step or none.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from configs.errors import InputError


class Checkpoints:
    """The checkpoints of one run, one folder per step.

    Args:
        folder: created if missing; a path on disk or in object storage.
        keep: newest steps to keep; at least 2, so that a damaged newest leaves something.
        background: write while training goes on; ``close`` waits for the last write.
    """

    def __init__(self, folder: Path, keep: int = 2, *, background: bool = False) -> None:
        import orbax.checkpoint as ocp  # imported late: it takes seconds

        self._ocp, self._folder = ocp, Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max(keep, 2), enable_async_checkpointing=background, create=True
            ),
        )

    def save(
        self, step: int, tree: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``tree`` and JSON ``meta`` as ``step``; a step that exists is replaced."""
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._manager.save(
            step,
            args=self._ocp.args.Composite(
                tree=self._ocp.args.StandardSave(dict(tree)),
                meta=self._ocp.args.JsonSave(dict(meta or {})),
            ),
        )

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

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
        try:
            restored = self._manager.restore(
                step, args=self._ocp.args.Composite(tree=self._ocp.args.StandardRestore(want))
            ).tree
        except Exception as error:  # orbax, tensorstore and zarr each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{where} cannot be read: {reason[:200]}") from error
        wanted = jax.tree_util.tree_leaves_with_path(want)
        for (path, leaf), found in zip(wanted, jax.tree.leaves(restored), strict=True):
            if found.shape != leaf.shape or found.dtype != leaf.dtype:
                name = jax.tree_util.keystr(path)
                raise InputError(
                    f"{where}: {name} is {found.dtype}{list(found.shape)}, "
                    f"the run asks for {leaf.dtype}{list(leaf.shape)}"
                )
        return restored

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
        return dict(self._manager.restore(step, args=args).meta)

    def close(self) -> None:
        """Wait for writes under way and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
