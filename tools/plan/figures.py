"""What one program costs one device: the record that is kept, compared and printed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.plan.chips import Slice
from tools.plan.compiling import OutOfMemory, compile_to_text
from tools.plan.hlo import Program, analyse
from tools.plan.hlo_text import read
from tools.plan.memory import Memory, compiled_memory
from tools.plan.placement import Placement
from tools.plan.roofline import collective_s, roofline

if TYPE_CHECKING:
    from jax.stages import Lowered


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes at one place of the program, all executions.

    link: "ici" within a slice, "dcn" between slices. count: executions. sent: bytes that a device
    sends. seconds: that they take if nothing else is on their links.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    devices: int  # in a group
    dtype: str
    op: str  # JAX's path of primitives
    count: float
    sent: float
    seconds: float


@dataclass(frozen=True)
class Figures:
    """One execution on one device. Bytes, FLOPs and seconds.

    compile_s is 0 where nothing was compiled: then these are estimates.
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    host: float
    matmul_flops: float
    attention_flops: float
    hbm_bytes: float
    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    collectives: tuple[Traffic, ...]
    notes: tuple[str, ...]
    compile_s: float

    @property
    def flops(self) -> float:
        """All that the matrix unit does."""
        return self.matmul_flops + self.attention_flops

    @property
    def hbm(self) -> float:
        """The most bytes of HBM that are in use at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def terms(self) -> dict[str, float]:
        """Seconds that each part of the machine needs."""
        return {
            "compute": self.compute_s,
            "hbm": self.hbm_s,
            "ici": self.ici_s,
            "dcn": self.dcn_s,
        }

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all collectives."""
        return sum(row.sent for row in self.collectives)


def measured(
    lowered: Lowered, place: Placement, on: Slice, loops: Mapping[str, int] | None = None
) -> Figures:
    """Compile a program and count; ``loops`` as of ``tools.plan.hlo.analyse``.

    A program that the compiler gives up because of its memory has figures all the same.
    """
    began = time.monotonic()
    try:
        compiled, text = compile_to_text(lowered)
        memory = compiled_memory(compiled)
    except OutOfMemory as error:
        text = error.text
        memory = Memory(_arguments(text), 0.0, 0.0, error.temporaries, 0.0, {})
    seconds = time.monotonic() - began
    return figures(memory, analyse(text, place, loops), place, on, seconds)


def figures(
    memory: Memory, program: Program, place: Placement, on: Slice, compile_s: float = 0.0
) -> Figures:
    """Counts with the times that follow from them."""
    times = roofline(program, 0.0, place, on)
    return Figures(
        arguments=memory.arguments,
        outputs=memory.outputs,
        aliased=memory.aliased,
        temporaries=memory.temporaries,
        host=memory.host,
        matmul_flops=program.matmul_flops,
        attention_flops=program.attention_flops,
        hbm_bytes=program.hbm_bytes,
        compute_s=times.compute_s,
        hbm_s=times.hbm_s,
        ici_s=times.ici_s,
        dcn_s=times.dcn_s,
        collectives=tuple(
            Traffic(
                kind=row.kind,
                axes=row.axes,
                link="dcn" if row.dcn else "ici",
                devices=row.devices,
                dtype=row.dtype,
                op=row.op,
                count=row.count,
                sent=row.sent,
                seconds=collective_s(row, place, on),
            )
            for row in program.collectives
        ),
        notes=program.notes,
        compile_s=compile_s,
    )


def _arguments(text: str) -> float:
    """Bytes of a program's arguments."""
    module = read(text)
    entry = module[module.entry]
    return float(sum(entry[name].array.bytes for name in entry.parameters))
