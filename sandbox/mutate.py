"""Procedural bugs: every small slip that the operators can make in a function.

    for edit in mutations(source, "slugify"):
        buggy = apply(source, edit)

An `Edit` replaces whole lines but touches only the characters it must: formatting and comments
stay. Every edit of today's operators lies inside one line. The same engine serves both sides:
the task generator applies it to correct code, the search-based repairer to buggy code.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from configs.errors import InputError
from sandbox.operators import OPERATORS, REVERSIBLE, Scope
from sandbox.source import Code, Cut, FunctionNode, FunctionSpan

__all__ = [
    "OPERATORS", "REVERSIBLE", "Edit", "FunctionSpan", "apply", "can_be_undone", "functions",
    "inverse", "mutations",
]  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """Lines `line..end_line` (from 1, both included) change from `old` to `new`.

    Both texts are whole lines joined by a newline, without the last line end.
    """

    line: int
    end_line: int
    old: str
    new: str
    operator: str


@lru_cache(maxsize=128)
def functions(source: str) -> tuple[FunctionSpan, ...]:
    """Functions and methods by qualified name, in source order, decorators counted in.

    Raises InputError when the source does not parse.
    """
    return tuple(span for span, _ in _parsed(source).functions)


def mutations(source: str, function: str | None = None) -> list[Edit]:
    """Every mutation of every operator inside a function (or in all functions).

    The order is fixed: by line, column, operator and new text. Each result compiles and differs
    from the source. Docstrings, annotations, decorators and f-strings are left alone.

    Raises InputError when the source does not parse or has no such function.
    """
    code = _parsed(source)
    outermost: list[tuple[FunctionSpan, FunctionNode]] = []
    for span, node in code.functions:
        wanted = function is None or span.name == function
        if wanted and not any(outer.line <= span.line <= outer.end_line for outer, _ in outermost):
            outermost.append((span, node))
    if function is not None and not outermost:
        raise InputError(f"no function {function!r} in this source: see functions(source)")
    edits: list[Edit] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "is" with a literal, and the like
        for span, node in outermost:
            edits.extend(_mutations(code, span, node))
    return edits


def apply(source: str, edit: Edit) -> str:
    """The source after the edit.

    Raises InputError when the lines are not the ones that the edit was made for.
    """
    lines = source.split("\n")
    if "\n".join(lines[edit.line - 1 : edit.end_line]) != edit.old:
        raise InputError(f"edit does not fit: line {edit.line} is not {edit.old.strip()!r}")
    return "\n".join([*lines[: edit.line - 1], edit.new, *lines[edit.end_line :]])


def inverse(edit: Edit) -> Edit:
    """The edit that undoes this one."""
    last = edit.line + edit.new.count("\n")
    return Edit(edit.line, last, edit.new, edit.old, edit.operator)


def can_be_undone(source: str, span: FunctionSpan, edit: Edit) -> bool:
    """Whether the operators, applied to the edited function, give the original again.

    As looking for it in `mutations` of the edited source tells, from that function alone.
    """
    if edit.operator in REVERSIBLE:
        return True
    lines = source.split("\n")
    lines[edit.line - 1 : edit.end_line] = edit.new.split("\n")
    code, offset = _alone(lines, span)
    node = next(node for found, node in code.functions if found.line == span.line - offset)
    at = edit.line - offset
    for scope, inner in _walk(Scope(code, node), node):
        for operator in OPERATORS.values():
            for cut in operator(scope, inner):
                if cut is not None and cut.line == at:
                    line = code.lines[at - 1]
                    if line[: cut.start] + cut.new + line[cut.end :] == edit.old:
                        return True
    return False


def _alone(lines: list[str], span: FunctionSpan) -> tuple[Code, int]:
    """A function without its module, if it parses so, and how many lines come before it."""
    own = lines[span.line - 1 : span.end_line]
    before = ["if 1:"] if own[0][:1].isspace() else []
    try:
        return Code("\n".join([*before, *own])), span.line - 1 - len(before)
    except InputError:
        return Code("\n".join(lines)), 0


@lru_cache(maxsize=4)
def _parsed(source: str) -> Code:
    """Callers ask about one file again and again, function by function."""
    return Code(source)


def _mutations(code: Code, span: FunctionSpan, function: FunctionNode) -> Iterator[Edit]:
    found: list[tuple[int, int, int, str, str]] = []
    for scope, node in _walk(Scope(code, function), function):
        for name, operator in OPERATORS.items():
            for cut in operator(scope, node):
                if cut is not None:
                    found.append((cut.line, cut.start, cut.end, name, cut.new))
    compiles = _Compiler(code, span)
    seen: set[tuple[int, str]] = set()
    for line, start, end, name, new in sorted(found):
        old = code.lines[line - 1]
        changed = old[:start] + new + old[end:]
        if changed != old and (line, changed) not in seen and compiles(Cut(line, start, end, new)):
            seen.add((line, changed))
            yield Edit(line, line, old, changed, name)


def _walk(scope: Scope, node: ast.AST) -> Iterator[tuple[Scope, ast.AST]]:
    """Nodes that may be mutated, each with its innermost function."""
    yield scope, node
    for field, value in ast.iter_fields(node):
        if field in ("decorator_list", "annotation", "returns", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk(Scope(scope.code, child), child)
            else:
                yield from _walk(scope, child)


class _Compiler:
    """Does an edited function still compile? Compiles the function alone where it can stand alone
    (a module of thousands of lines would cost a tenth of a second for each edit)."""

    def __init__(self, code: Code, span: FunctionSpan) -> None:
        self.lines, self.offset = code.lines[span.line - 1 : span.end_line], span.line - 1
        self.prefix = "if 1:\n" if self.lines[0][:1].isspace() else ""
        if not self._compiles(self.lines):
            self.lines, self.offset, self.prefix = code.lines, 0, ""

    def __call__(self, cut: Cut) -> bool:
        lines, at = list(self.lines), cut.line - self.offset - 1
        lines[at] = lines[at][: cut.start] + cut.new + lines[at][cut.end :]
        return self._compiles(lines)

    def _compiles(self, lines: list[str]) -> bool:
        try:
            compile(self.prefix + "\n".join(lines), "<mutant>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
        return True
