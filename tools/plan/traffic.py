"""Bytes that an instruction reads from HBM and writes to it: an estimate.

Every fusion reads its operands once and writes its results once; what passes between the
instructions inside stays on the chip. Arrays that the compiler placed elsewhere (``S(1)`` is VMEM)
cost nothing. Slices count as long as they are, and so do updates in place. Left out: the padding of
tiled layouts, and operands that are too large for the chip and are read more than once.
"""

from __future__ import annotations

from collections.abc import Iterable

from tools.plan.hlo_text import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Instructions that move nothing themselves: names for values, control flow, and the second half of
# what was counted at its start.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("add-dependency", "partition-id", "replica-id", "while", "conditional", "call"),
    *("optimization-barrier", "domain"),
}
_FREE_TARGETS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding"}
_PICKS = ("dynamic-slice", "slice", "gather")


def hbm_bytes(module: Module, where: Computation, instruction: Instruction) -> float:
    """Bytes read and written by one execution of an instruction that is in no fusion."""
    op = instruction.opcode
    if op in _FREE or op.endswith("-done"):
        return 0.0
    if op == "custom-call":
        target = (instruction.attribute("custom_call_target") or "").strip('"')
        if target in _FREE_TARGETS:
            return 0.0
    operands = [where[name] for name in instruction.operands]
    if op == "fusion":
        inside = module[instruction.calls("calls")[0]]
        if starts_collective(inside[inside.root]):
            return _in_hbm(operands[0].arrays) + _in_hbm(instruction.elements[1])
        return _read(module, inside, operands) + _written(module, inside, instruction.elements)
    if op in ("async-start", "async-update"):
        return _offloaded(operands, instruction)
    if op in ("send", "recv"):
        return _in_hbm(instruction.elements[0])
    if op in _PICKS:
        ends = (operands[0].array.space, instruction.array.space)
        return sum(instruction.array.bytes for space in ends if space == 0)
    if op == "dynamic-update-slice":
        return 2 * operands[1].array.bytes if not instruction.array.space else 0.0
    if op == "scatter":
        return 3 * _in_hbm([operands[-1].array])
    if op.endswith("-start"):
        return _started(operands, instruction)
    return sum(_in_hbm(o.arrays) for o in operands) + _in_hbm(instruction.arrays)


def _offloaded(operands: list[Instruction], instruction: Instruction) -> float:
    """A gather by the SparseCores, which look up rows: as much is read as is written.

    Its results are known where it starts, or where it is given its operands after that. Others are
    counted in the computation that they run.
    """
    later = instruction.opcode == "async-update"
    start = operands[0] if later else instruction
    if not on_sparsecore(start) or (later and start.elements[1]):
        return 0.0
    return 2 * _in_hbm(instruction.elements[1])


def on_sparsecore(instruction: Instruction) -> bool:
    """Whether a computation is started on the SparseCores."""
    return instruction.attribute("async_execution_thread") == '"sparsecore"'


def _started(operands: list[Instruction], instruction: Instruction) -> float:
    """An asynchronous copy, slice or collective: its result, once for each end that is in HBM."""
    copied = instruction.opcode == "copy-start"
    result = instruction.elements[0 if copied or len(instruction.elements) < 2 else 1]
    size = sum(array.bytes for array in result)
    if any(instruction.opcode.startswith(kind) for kind in COLLECTIVES):
        return sum(_in_hbm(o.arrays) for o in operands) + _in_hbm(result)
    ends = (operands[0].array.space, result[0].space)
    return sum(size for space in ends if space == 0)


def _read(module: Module, inside: Computation, operands: Iterable[Instruction]) -> float:
    """Bytes that a fusion reads of its operands."""
    return sum(
        _touched(module, inside, inside[name], operand.array)
        for name, operand in zip(inside.parameters, operands, strict=True)
        if operand.arrays and operand.array.space == 0
    )


def _touched(module: Module, inside: Computation, value: Instruction, array: Array) -> float:
    """Bytes of ``array``, which is ``value`` in a fusion, that the fusion looks at."""
    total = 0.0
    for user in inside.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            total += _touched(module, inside, user, array)
        elif user.opcode in _PICKS and first:
            total += user.array.bytes
        elif user.opcode == "fusion":
            nested = module[user.calls("calls")[0]]
            total += sum(
                _touched(module, nested, nested[name], array)
                for name, operand in zip(nested.parameters, user.operands, strict=True)
                if operand == value.name
            )
        elif not (_in_place(user) and first) and user.opcode != "tuple" and not passes_by(user):
            return array.bytes
    return min(total, array.bytes)


def _written(module: Module, inside: Computation, elements: tuple[tuple[Array, ...], ...]) -> float:
    """Bytes that a fusion writes of its results."""
    root = inside[inside.root]
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(elements):  # a custom call that gives the whole tuple
        return 0.0 if passes_by(root) else sum(_in_hbm(element) for element in elements)
    return sum(
        _result(module, inside, result)
        for result, element in zip(results, elements, strict=True)
        if element and element[0].space == 0
    )


def _result(module: Module, inside: Computation, value: Instruction) -> float:
    """Bytes that are new in a result: an array updated in place is not written whole."""
    while value.opcode == "bitcast":
        value = inside.operand(value, 0)
    if value.opcode == "parameter" or passes_by(value):
        return 0.0
    if _in_place(value):
        return inside.operand(value, 1).array.bytes
    if value.opcode == "fusion":
        nested = module[value.calls("calls")[0]]
        return _written(module, nested, value.elements)
    return sum(array.bytes for array in value.arrays)


def _in_place(instruction: Instruction) -> bool:
    return instruction.opcode == "dynamic-update-slice"


def passes_by(instruction: Instruction) -> bool:
    """Whether this is a collective, started elsewhere, of which a fusion does a part.

    XLA:TPU runs a collective beside a matrix product as a chain of fusions that each contain it:
    one with a custom call ``AsyncCollectiveStart``, any number that also compute, and one with
    ``AsyncCollectiveDone``. All carry its ``chain_id``.
    """
    return "AsyncCollective" in instruction.attributes or (
        instruction.opcode in COLLECTIVES and "chain_id=" in instruction.attributes
    )


def starts_collective(instruction: Instruction) -> bool:
    """Whether this is the custom call that starts such a chain."""
    return 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes


def _in_hbm(arrays: Iterable[Array]) -> float:
    """Bytes of those that lie in HBM; scalars lie in registers."""
    return sum(array.bytes for array in arrays if array.space == 0 and array.dims)
