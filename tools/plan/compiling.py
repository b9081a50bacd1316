"""Compile for a TPU that is not here, and get the program's text."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.stages import Compiled, Lowered

# libtpu's names of what it writes. It stops before the first where memory does not suffice; the
# counts of both texts are the same.
_FINAL = "*.after_codegen.txt"
_OPTIMISED = "*.after_optimizations.txt"


class OutOfMemory(Exception):
    """The chip has less memory than the program needs.

    Attributes:
      text: its optimised HLO.
      temporaries: bytes, beside its arguments.
    """

    def __init__(self, text: str, temporaries: float) -> None:
        super().__init__(f"temporaries of {temporaries:.0f} bytes do not fit")
        self.text, self.temporaries = text, temporaries


def compile_to_text(lowered: Lowered, **options: str | bool) -> tuple[Compiled, str]:
    """The compiled program and its optimised HLO, as libtpu itself writes it.

    ``compiled.as_text()`` reads the program with jaxlib, which may be older than libtpu and refuse
    it ("async-update instruction should have 1 operands but sees 3", jaxlib 0.10.2 with libtpu
    0.0.52). The text is otherwise the same. ``options`` are the compiler's.

    Raises OutOfMemory where libtpu gives up because of it.
    """
    import jax

    with tempfile.TemporaryDirectory(prefix="remend-plan-") as folder:
        options |= {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            found = _out_of_memory(str(error), Path(folder))
            if found is None:
                raise
            raise found from None
        return compiled, text_in(Path(folder))


def text_in(folder: Path, pattern: str = _FINAL) -> str:
    """The program's text among what libtpu has written into a folder.

    Helpers that run on the device have modules of their own, which are smaller.
    """
    texts = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
    if not texts:
        raise RuntimeError(f"libtpu wrote no {pattern} into {folder}")
    return texts[-1].read_text()


def _out_of_memory(message: str, folder: Path) -> OutOfMemory | None:
    """What an error of libtpu says about memory, None if it is about something else."""
    if "Ran out of memory" not in message:
        return None
    # "… required for HLO temporaries (22.19G) exceeds …", "Used 22.19G of 15.75G hbm. …"
    told = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    size = float(told[1]) * 1024 ** (1 + "KMGT".index(told[2])) if told else 0.0
    return OutOfMemory(text_in(folder, _OPTIMISED), size)
