"""Compile for a TPU that is not here, and get the program's text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.stages import Compiled, Lowered

_FINAL = "*.after_codegen.txt"


def compile_to_text(lowered: Lowered) -> tuple[Compiled, str]:
    """The compiled program and its optimised HLO, as libtpu itself writes it.

    ``compiled.as_text()`` reads the program with jaxlib, which may be older than libtpu and refuse
    it ("async-update instruction should have 1 operands but sees 3", jaxlib 0.10.2 with libtpu
    0.0.52). The text is otherwise the same.
    """
    with tempfile.TemporaryDirectory(prefix="remend-plan-") as folder:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )
        texts = sorted(Path(folder).glob(_FINAL), key=lambda path: path.stat().st_size)
        # helpers that run on the device have modules of their own; the program is the largest
        if not texts:
            raise RuntimeError(f"libtpu wrote no {_FINAL} into {folder}")
        return compiled, texts[-1].read_text()
