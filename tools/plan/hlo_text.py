"""Read the text of an optimised HLO module (``compiled.as_text()``) into computations.

Only structure is read here; what an instruction costs is the business of those who walk it. The
format: https://github.com/openxla/xla/blob/main/xla/hlo/ir/hlo_instruction.cc, as printed with
operands by name only. Newer jaxlibs (0.12) have a member of a tuple printed as ``%name#2`` where it
is used; it is read as the get-tuple-element that it stands for.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1.0),
    **dict.fromkeys(("s2", "u2"), 0.25),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    "c128": 16.0,
    **dict.fromkeys(("token", "opaque"), 0.0),
}


class Array(NamedTuple):
    """Type of one array. ``space`` is where it lies: 0 is HBM, others are on the chip or host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without the padding of tiled layouts; eight-bit floats have many names."""
        return self.size * _BYTES.get(self.dtype, 1.0)


@dataclass
class Instruction:
    """One line. ``elements`` holds one entry for an array, one for each member of a tuple."""

    name: str
    opcode: str
    elements: tuple[tuple[Array, ...], ...]
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses of a constant or parameter
    attributes: str  # what follows the operands, without backend_config
    config: str  # backend_config
    tuple_shaped: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the result."""
        return tuple(array for element in self.elements for array in element)

    @property
    def array(self) -> Array:
        """The result of an instruction that gives one array."""
        return self.arrays[0]

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX's primitives that it comes from, or an empty string."""
        match = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, key: str) -> str | None:
        """The text of an attribute: a word, quoted text, or braces with what they hold."""
        match = re.search(rf"(?<![\w.-]){key}=", self.attributes)
        if not match:
            return None
        rest = self.attributes[match.end() :]
        if rest.startswith("{"):
            return rest[: _closing(rest, 0, "{", "}") + 1]
        word = _WORD.match(rest)
        return word[0] if word else ""

    def calls(self, key: str) -> list[str]:
        """Names of the computations in an attribute."""
        return _NAME.findall(self.attribute(key) or "")


@dataclass
class Computation:
    """Instructions in the order they run, by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""
    fused: bool = False  # the inside of a fusion

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that gives an operand."""
        return self.instructions[instruction.operands[index]]

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names of the parameters by number."""
        found = [i for i in self if i.opcode == "parameter"]
        return [i.name for i in sorted(found, key=lambda i: int(i.literal))]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes an instruction's result, by its name."""
        out: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                out[operand].append(instruction)
        return out


@dataclass
class Module:
    """A program: its computations by name, and the one that starts it."""

    computations: dict[str, Computation]
    entry: str
    partitions: int  # devices that run it together

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    @functools.cached_property
    def callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """Where a computation is called from (the last place, if there are several)."""
        out = {}
        for computation in self.computations.values():
            for instruction in computation:
                for name in called(instruction):
                    out[name] = (computation, instruction)
        return out


CALLS = {
    "fusion": ("calls",),
    "call": ("to_apply",),
    "while": ("condition", "body"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "async-start": ("calls",),
}


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs (not those applied element by element)."""
    keys = CALLS.get(instruction.opcode, ())
    return [name for key in keys for name in instruction.calls(key)]


_NAME = re.compile(r"%([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+(?:#\d+)?)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_WORD = re.compile(r'"[^"]*"|mesh\[[^\]]*\](?:, device_ids=\(\S*\))? \{[^}]*\}|\S+?(?=,\s|\s|$)')
_END = re.compile(r"^\}(, execution_thread=|$)")  # there are threads of the SparseCores
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_MARKS = re.compile(r'\\.|["(){}]')
_COMMENT = re.compile(r"/\*index=\d+\*/")


def read(text: str) -> Module:
    """The module of an HLO text. Raises ValueError where it is none."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = Computation(header[2])
                computations[current.name] = current
                entry = current.name if header[1] else entry
        elif _END.match(line):
            current = None
        elif match := _LINE.match(line):
            instruction = _instruction(match[2], line[match.end() :])
            for name in instruction.operands:
                if "#" in name and name not in current.instructions:
                    current.instructions[name] = _member(current, name)
            current.instructions[instruction.name] = instruction
            if match[1]:
                current.root = instruction.name
    if not entry:
        raise ValueError("this is not the text of an HLO module: there is no ENTRY computation")
    for computation in computations.values():
        for instruction in computation:
            if instruction.opcode == "fusion":
                computations[instruction.calls("calls")[0]].fused = True
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.index("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, an instruction's continuation joined to it: kernel metadata holds line breaks."""
    pending: str | None = None
    for line in text.splitlines():
        if pending is not None and line and not (_END.match(line) or _LINE.match(line)):
            pending += line
            continue
        if pending is not None:
            yield pending
            pending = None
        if _LINE.match(line):
            pending = line
        else:
            yield line
    if pending is not None:
        yield pending


def _instruction(name: str, rest: str) -> Instruction:
    """Everything behind ``%name = ``."""
    rest, _, config = rest.partition(", backend_config=")
    rest = _COMMENT.sub("", rest)
    tuple_shaped = rest.startswith("(")
    end = _closing(rest, 0, "(", ")") + 1 if tuple_shaped else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if not opcode:
        raise ValueError(f"no opcode in the instruction {name}: {rest[:200]}")
    close = _closing(rest, opcode.end() - 1, "(", ")")
    inside = rest[opcode.end() : close]
    plain = opcode[1] in ("constant", "parameter")
    return Instruction(
        name=name,
        opcode=opcode[1],
        elements=_elements(rest[:end]) if tuple_shaped else (_arrays(rest[:end]),),
        operands=() if plain else tuple(_OPERAND.findall(inside)),
        literal=inside if plain else "",
        attributes=rest[close + 1 :],
        config=config,
        tuple_shaped=tuple_shaped,
    )


def _member(where: Computation, name: str) -> Instruction:
    """The get-tuple-element that an operand ``tuple#index`` stands for."""
    of, _, index = name.partition("#")
    return Instruction(
        name=name,
        opcode="get-tuple-element",
        elements=(where[of].elements[int(index)],),
        operands=(of,),
        literal="",
        attributes=f", index={index}",
        config="",
        tuple_shaped=False,
    )


@functools.lru_cache(maxsize=4096)
def _arrays(text: str) -> tuple[Array, ...]:
    out = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
        out.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(out)


@functools.lru_cache(maxsize=4096)
def _elements(text: str) -> tuple[tuple[Array, ...], ...]:
    """The members of a tuple type, each with its arrays."""
    out, depth, start = [], 0, 1
    for i, char in enumerate(text):
        if char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        if (char == "," and depth == 1) or depth == 0:
            if text[start:i].strip():
                out.append(_arrays(text[start:i].strip()))
            start = i + 1
    return tuple(out)


def _closing(text: str, start: int, left: str, right: str) -> int:
    """Index of the bracket that closes the one at ``start``; quoted text does not count."""
    depth, quoted = 0, False
    for match in _MARKS.finditer(text, start):
        mark = match[0]
        if mark == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif mark == left:
            depth += 1
        elif mark == right:
            depth -= 1
            if not depth:
                return match.start()
    raise ValueError(f"unbalanced {left}{right}: {text[start : start + 200]}")
