"""How often a loop of an HLO program runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from configs.errors import InputError
from tools.plan.hlo_text import CALLS, Computation, Instruction, Module

# Instructions that hand on a value as it is.
_SAME = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "optimization-barrier")


def trips(
    module: Module, where: Computation, loop: Instruction, given: Mapping[str, int] | None = None
) -> int:
    """Times that a ``while`` runs its body.

    From ``known_trip_count`` where the compiler wrote it, else from a condition that compares a
    counter with a constant. Otherwise the data decides, and ``given`` must have a number: its keys
    are parts of the loop's name or op_name. Raises InputError naming the loop if it has none.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.config)
    if known:
        return int(known[1])
    counted = _counted(module, where, loop)
    if counted is not None:
        return counted
    for key, count in (given or {}).items():
        if key == loop.name or key in loop.op_name:
            return count
    raise InputError(
        f"loop {loop.name} ({loop.op_name or 'no op_name'}) runs as often as its data says: "
        f"pass a number for it, loops={{{loop.name!r}: N}}"
    )


def _counted(module: Module, where: Computation, loop: Instruction) -> int | None:
    """Trips of ``for (i = start; i < limit; i += step)``, None for any other loop."""
    condition = module[loop.calls("condition")[0]]
    body = module[loop.calls("body")[0]]
    test = _comparison(module, condition)
    if test is None:
        return None
    left, right, direction = test
    if _element(left) is None or constant(module, *left) is not None:
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    index, limit = _element(left), constant(module, *right)
    if index is None or limit is None:
        return None
    first, step = _member(module, where, loop, index), _step(module, body, index)
    start = constant(module, where, first) if first else None
    if start is None or not step:
        return None
    if direction in ("LE", "GE"):
        limit += 1 if direction == "LE" else -1
    elif direction == "NE" and (limit - start) % step:
        return None
    return max(0, math.ceil((limit - start) / step))


Value = tuple[Computation, Instruction]


def _comparison(module: Module, condition: Computation) -> tuple[Value, Value, str] | None:
    """Both sides and the direction of the compare that a condition ends in."""
    where, found = origin(module, condition, condition[condition.root])
    if found.opcode != "compare":
        return None
    left, right = (origin(module, where, where.operand(found, i)) for i in (0, 1))
    return left, right, found.attribute("direction") or ""


def _element(value: Value) -> int | None:
    """Which member of its computation's parameter a value is."""
    where, found = value
    if found.opcode != "get-tuple-element" or where.operand(found, 0).opcode != "parameter":
        return None
    return int(found.attribute("index") or 0)


def _member(
    module: Module, where: Computation, loop: Instruction, index: int
) -> Instruction | None:
    """What a loop starts with as member ``index`` of its state, where that is made beside it."""
    inner, state = origin(module, where, where.operand(loop, 0))
    return where.operand(state, index) if state.opcode == "tuple" and inner is where else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What the body adds to member ``index`` of its state; None if it does something else."""
    root = body[body.root]
    if root.opcode != "tuple":
        return None
    where, found = origin(module, body, body.operand(root, index))
    if found.opcode not in ("add", "subtract"):
        return None
    sides = [origin(module, where, where.operand(found, i)) for i in (0, 1)]
    if found.opcode == "add" and _element(sides[0]) != index:
        sides.reverse()
    if _element(sides[0]) != index or sides[0][0] is not body:
        return None
    step = constant(module, *sides[1])
    return -step if step is not None and found.opcode == "subtract" else step


def constant(module: Module, where: Computation, value: Instruction) -> int | None:
    """The integer that a value always is, None if it may change."""
    where, found = origin(module, where, value)
    if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal):
        return int(found.literal)
    return None


def origin(module: Module, where: Computation, value: Instruction) -> Value:
    """The instruction that made a value, looking through copies, tuples, calls and loops.

    A member of a loop's state is looked through where the body hands it on unchanged.
    """
    while (further := _look_through(module, where, value)) is not None:
        where, value = further
    return where, value


def _look_through(module: Module, where: Computation, value: Instruction) -> Value | None:
    """One step towards a value's origin, None at its end."""
    if value.opcode in _SAME:
        return where, where.operand(value, 0)
    if value.opcode == "get-tuple-element":
        return _pick(module, where, value)
    if value.opcode == "fusion" or value.opcode == "call":
        inside = module[value.calls(*CALLS[value.opcode])[0]]
        return inside, inside[inside.root]
    if value.opcode == "parameter" and where.name in module.callers:
        outside, call = module.callers[where.name]
        if call.opcode in ("fusion", "call"):
            return outside, outside.operand(call, int(value.literal))
    return None


def _pick(module: Module, where: Computation, value: Instruction) -> Value | None:
    """The step through a get-tuple-element."""
    index = int(value.attribute("index") or 0)
    inner, made = origin(module, where, where.operand(value, 0))
    if made.opcode == "tuple":
        return inner, inner.operand(made, index)
    if made.opcode == "parameter" and inner.name in module.callers:
        inner, made = module.callers[inner.name]  # the state of a loop, seen from inside
    if made.opcode != "while" or not _invariant(module, made, index):
        return None
    start = _member(module, inner, made, index)
    return (inner, start) if start else None


def _invariant(module: Module, loop: Instruction, index: int) -> bool:
    """Whether a loop's body hands on member ``index`` of its state unchanged."""
    body = module[loop.calls("body")[0]]
    root = body[body.root]
    if root.opcode != "tuple":
        return False
    value = body.operand(root, index)
    while value.opcode in _SAME:
        value = body.operand(value, 0)
    return (
        value.opcode == "get-tuple-element"
        and body.operand(value, 0).opcode == "parameter"
        and int(value.attribute("index") or 0) == index
    )
