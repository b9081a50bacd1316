"""Count what one device does in a compiled program: FLOPs, bytes over links, bytes of HBM.

``compiled.cost_analysis()`` counts the body of a loop once. Here the program's text is walked with
every loop's trips applied, and every collective is named with the mesh axes that it runs over.

Bytes *sent* by a device in one execution of a collective among n devices, by the best algorithms on
a ring or torus (each device at once a sender and a forwarder):

    all-gather          (n-1)/n of the result
    reduce-scatter      (n-1)/n of the operand
    all-reduce          2 (n-1)/n of the operand
    all-to-all          (n-1)/n of the operand; on a ring they then travel several links, which is
                        the business of ``tools/plan/roofline.py``
    collective-permute  the operand
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tools.plan import kernels
from tools.plan.convolution import flops as convolution_flops
from tools.plan.groups import Groups, megascale_target, pairs, replica_groups
from tools.plan.hlo_text import Computation, Instruction, Module, called, read
from tools.plan.placement import Placement
from tools.plan.traffic import (
    COLLECTIVES,
    hbm_bytes,
    on_sparsecore,
    passes_by,
    starts_collective,
)
from tools.plan.trips import trips


@dataclass(frozen=True)
class Collective:
    """Executions of a collective at one place of the program, or of several that are alike."""

    kind: str
    dtype: str
    axes: tuple[str, ...]  # of the mesh, outermost first; empty where no mesh was given
    devices: int  # in a group
    op: str  # JAX's path of primitives
    dcn: bool  # carried by the hosts' network
    count: float  # executions
    bytes: float  # of the larger of operand and result, all executions
    sent: float  # by this device, all executions
    groups: Groups = field(compare=False, repr=False, default=())


@dataclass(frozen=True)
class Program:
    """Counts of one device and one execution of the program."""

    matmul_flops: float
    attention_flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    loops: tuple[tuple[str, int], ...]  # (op_name or name, trips) of every loop
    notes: tuple[str, ...]  # what was assumed

    @property
    def flops(self) -> float:
        """All FLOPs that the matrix unit does."""
        return self.matmul_flops + self.attention_flops


def analyse(
    text: str, placement: Placement | None = None, loops: Mapping[str, int] | None = None
) -> Program:
    """Count an optimised module (``compiled.as_text()``).

    Args:
        placement: the mesh that it was compiled for, to name the axes of collectives.
        loops: trips of loops that depend on data, by a part of their name or op_name.

    Raises InputError where such a loop has no number.
    """
    return _Walk(read(text), placement, loops or {}).program()


@dataclass
class _Cost:
    """Counts of a computation, for one execution."""

    matmul: float = 0.0
    attention: float = 0.0
    hbm: float = 0.0
    collectives: dict[Collective, Collective] = field(default_factory=dict)

    def add(self, other: _Cost, times: float = 1.0, op: str = "") -> None:
        """Add ``times`` the other's; collectives that carry no name are given ``op``."""
        self.matmul += times * other.matmul
        self.attention += times * other.attention
        self.hbm += times * other.hbm
        for row in other.collectives.values():
            row = replace(row, op=row.op or op)
            self.take(
                replace(
                    row, count=times * row.count, bytes=times * row.bytes, sent=times * row.sent
                )
            )

    def take(self, row: Collective) -> None:
        """Add a collective to those like it."""
        key = replace(row, count=0, bytes=0, sent=0)
        have = self.collectives.get(key)
        if have:
            row = replace(
                row,
                count=have.count + row.count,
                bytes=have.bytes + row.bytes,
                sent=have.sent + row.sent,
            )
        self.collectives[key] = row


class _Walk:
    """One pass over a module; computations are counted once and multiplied by their callers."""

    def __init__(self, module: Module, placement: Placement | None, loops: Mapping[str, int]):
        self.module = module
        self.placement = placement
        self.given = loops
        self.loops: list[tuple[str, int]] = []
        self.notes: dict[str, None] = {}  # in order, each once
        self.cost = functools.cache(self._cost)
        self.groups = functools.cache(self._groups)
        self.axes = functools.cache(self._axes)

    def program(self) -> Program:
        total = self.cost(self.module.entry, False)
        rows = sorted(total.collectives.values(), key=lambda row: -row.sent)
        return Program(
            matmul_flops=total.matmul,
            attention_flops=total.attention,
            hbm_bytes=total.hbm,
            collectives=tuple(rows),
            loops=tuple(self.loops),
            notes=tuple(self.notes),
        )

    def _cost(self, name: str, fused: bool) -> _Cost:
        """Counts of a computation; instructions of a fusion move no bytes of HBM themselves."""
        where, total = self.module[name], _Cost()
        for instruction in where:
            op = instruction.opcode
            if op in ("convolution", "dot"):
                total.matmul += convolution_flops(where, instruction)
            elif op == "while":
                count = trips(self.module, where, instruction, self.given)
                self.loops.append((instruction.op_name or instruction.name, count))
                inside = _Cost()
                for part in called(instruction):
                    inside.add(self.cost(part, False))
                total.add(inside, count, stem(instruction.op_name))
            elif op == "conditional":
                total.add(self._branch(instruction))
            elif op == "custom-call":
                self._kernel(where, instruction, total)
            elif row := self._collective(where, instruction):
                total.take(row)
            else:
                inside_one = fused or op == "fusion" or on_sparsecore(instruction)
                for part in called(instruction):
                    total.add(self.cost(part, inside_one))
            if not fused:
                total.hbm += hbm_bytes(self.module, where, instruction)
        return total

    def _branch(self, instruction: Instruction) -> _Cost:
        """The dearest branch of a conditional."""
        branches = [self.cost(name, False) for name in called(instruction)]
        best = max(
            branches,
            key=lambda c: (
                c.matmul + c.attention,
                sum(row.sent for row in c.collectives.values()),
                c.hbm,
            ),
        )
        if any(branch.matmul + branch.attention for branch in branches):
            name = instruction.op_name or instruction.name
            self.notes[f"{name}: counted as if it always took its dearest branch"] = None
        return best

    def _kernel(self, where: Computation, instruction: Instruction, total: _Cost) -> None:
        if kernels.TARGET not in instruction.attributes:
            return
        work = kernels.work(where, instruction)
        if work is None:
            name = instruction.op_name or instruction.name
            self.notes[f"{name}: a Pallas kernel whose FLOPs nothing tells; counted as none"] = None
            return
        total.attention += work.flops
        total.hbm += work.rereads

    def _collective(self, where: Computation, instruction: Instruction) -> Collective | None:
        """The row of a collective, None for anything else (or for a part of one)."""
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send":
            return self._between_slices(where, instruction)
        if kind not in COLLECTIVES:
            return None
        if passes_by(instruction) and not any(
            map(starts_collective, where.users[instruction.name])
        ):
            return None  # counted in the fusion that starts it
        operands = [array for name in instruction.operands for array in where[name].arrays]
        results = instruction.arrays
        if kind != instruction.opcode and instruction.elements[0] == tuple(operands):
            results = instruction.elements[1] if len(instruction.elements) > 1 else results
        if kind == "all-reduce" and _is_scattered(where, instruction):
            kind = "reduce-scatter"
        size = max(sum(array.bytes for array in arrays) for arrays in (operands, results))
        key = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
        groups = self.groups(key, instruction.attribute(key) or "{}")
        if not groups:
            return None  # a permute in which nobody sends to another
        if kind == "all-reduce" and "gather" in instruction.op_name.rpartition("/")[2]:
            self.notes[
                f"{stem(instruction.op_name)}: the compiler made this gather an all-reduce of "
                "arrays that are zero elsewhere: twice the bytes, on more links at once"
            ] = None
        return self._row(kind, operands[0].dtype, size, groups, instruction.op_name)

    def _between_slices(self, where: Computation, send: Instruction) -> Collective | None:
        """A collective over slices: the compiler hands it to the hosts as a pair of send and recv.

        It says which by ``_xla_megascale_transfer_type``. The recv beside it is not counted.
        """
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
        if not found:
            return None
        kind = _BETWEEN_SLICES.get(found[1], found[1].lower().replace("_", "-"))
        data = where.operand(send, 0).array
        groups = self.groups("target", send.attribute("_xla_megascale_target") or "")
        devices = max(map(len, groups), default=1)
        size = data.bytes * (devices if kind == "all-gather" else 1)
        name = re.search(r'_rendezvous="([^"]*)"', send.attributes)
        op = send.op_name or (re.sub(r"[._\d]+$", "", name[1]) if name else "")
        return replace(self._row(kind, data.dtype, size, groups, op), dcn=True)

    def _row(self, kind: str, dtype: str, size: float, groups: Groups, op: str) -> Collective:
        permute = kind == "collective-permute"
        devices = max(map(len, groups), default=1)
        sent = size * SENT[kind](devices)
        if permute and self.placement:
            devices = self.placement.along(self.axes(groups))
        return Collective(
            kind=kind,
            dtype=dtype,
            axes=self.axes(groups),
            devices=devices,
            op=stem(op),
            dcn=False,
            count=1.0,
            bytes=size,
            sent=sent,
            groups=groups[:1] if not permute else groups,
        )

    def _groups(self, notation: str, text: str) -> Groups:
        """Groups of places in the mesh, from the notation of an attribute."""
        place = self.placement
        if notation == "target":
            return place.of_ids(megascale_target(text)) if place else megascale_target(text)
        if notation == "source_target_pairs":
            groups = pairs(text)
        else:
            groups = replica_groups(text, self.module.partitions)
        return place.of_locals(groups, self.module.partitions) if place else groups

    def _axes(self, groups: Groups) -> tuple[str, ...]:
        return self.placement.axes(groups) if self.placement else ()


SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
_BETWEEN_SLICES = {"ONE_TO_ONE": "collective-permute"}


def _is_scattered(where: Computation, reduced: Instruction) -> bool:
    """Whether a fusion keeps one slice of an all-reduce: a reduce-scatter as XLA:TPU has it."""
    users = where.users[reduced.name]
    while len(users) == 1 and users[0].opcode == "bitcast":
        users = where.users[users[0].name]
    return where.fused and bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def stem(op_name: str) -> str:
    """JAX's path of primitives without the steps that only wrap others.

    ``jit(step)/shard_map/transpose(jvp())/while/body/closed_call/checkpoint/all_gather`` becomes
    ``transpose(jvp())/while/checkpoint/all_gather``.
    """
    return "/".join(step for step in op_name.split("/") if not _WRAPS.fullmatch(step))


_WRAPS = re.compile(r"jit\(.*\)|shard_map|body|closed_call|jvp\(\)|cond|branch_\d+_fun|")
