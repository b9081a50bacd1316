"""Python source with exact character positions, so that edits can touch only what they must.

`ast` says where a node lies in UTF-8 bytes and says nothing about operators and parentheses;
`tokenize` says where every token lies in characters. `Code` joins the two: positions here are
`(line, column)` with lines from 1 and columns in characters from 0.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from configs.errors import InputError

Position = tuple[int, int]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

OUTSIDE = "<module>"  # in the place of a function's name: outside any

_SKIPPED_TOKENS = frozenset(
    {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
)


@dataclass(frozen=True)
class Cut:
    """Replace columns `start..end` of one line by `new`."""

    line: int
    start: int
    end: int
    new: str


@dataclass(frozen=True)
class FunctionSpan:
    """A function by qualified name (`f`, `Class.method`, `f.<locals>.g`) and its lines, decorators
    included; lines count from 1 and `end_line` is the last line of the body."""

    name: str
    line: int
    end_line: int


@dataclass(frozen=True)
class Token:
    text: str
    start: Position
    end: Position


class Code:
    """One parsed module.

    Raises InputError when the text is not valid Python.
    """

    def __init__(self, text: str) -> None:
        if re.search(r"\r(?!\n)", text):
            raise InputError("source uses bare carriage returns as line ends: convert it to \\n")
        self.text = text
        self.lines = text.split("\n")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise InputError(f"source is not valid Python: {error}") from error

    @cached_property
    def tokens(self) -> list[Token]:
        """Every token that is code; made when first asked for, since it takes twice as long as
        parsing and finding functions needs none."""
        try:
            return [
                Token(t.string, t.start, t.end)
                for t in tokenize.generate_tokens(io.StringIO(self.text).readline)
                if t.type not in _SKIPPED_TOKENS
            ]
        except (SyntaxError, tokenize.TokenError) as error:
            raise InputError(f"source is not valid Python: {error}") from error

    @cached_property
    def _starts(self) -> list[Position]:
        return [token.start for token in self.tokens]

    def position(self, line: int, byte_column: int) -> Position:
        text = self.lines[line - 1]
        if text.isascii():
            return line, byte_column
        return line, len(text.encode()[:byte_column].decode())

    def start(self, node: ast.expr | ast.stmt) -> Position:
        return self.position(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> Position:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.position(node.end_lineno, node.end_col_offset)

    def cut(self, start: Position, end: Position, new: str) -> Cut | None:
        """The edit of that stretch, or None when it runs over a line end."""
        return Cut(start[0], start[1], end[1], new) if start[0] == end[0] else None

    def replace(self, node: ast.expr | ast.stmt, new: str) -> Cut | None:
        return self.cut(self.start(node), self.end(node), new)

    def segment(self, node: ast.expr | ast.stmt) -> str | None:
        """The node's own text, or None when it runs over a line end."""
        start, end = self.start(node), self.end(node)
        return self.lines[start[0] - 1][start[1] : end[1]] if start[0] == end[0] else None

    def first_token(self, position: Position) -> int:
        """Index of the first token that starts at or after a position."""
        return bisect_left(self._starts, position)

    def between(self, left: ast.expr, right: ast.expr) -> list[Token]:
        """The tokens between two operands, parentheses left out: the operator."""
        low, high = self.first_token(self.end(left)), self.first_token(self.start(right))
        return [token for token in self.tokens[low:high] if token.text not in "()"]

    def wrapped(self, node: ast.expr) -> tuple[Position, Position]:
        """Where a node starts and ends when the parentheses around it are counted in."""
        start, end = self.start(node), self.end(node)
        before, after = self.first_token(start) - 1, self.first_token(end)
        while (
            before >= 0
            and after < len(self.tokens)
            and self.tokens[before].text == "("
            and self.tokens[after].text == ")"
        ):
            start, end = self.tokens[before].start, self.tokens[after].end
            before, after = before - 1, after + 1
        return start, end

    @cached_property
    def functions(self) -> list[tuple[FunctionSpan, FunctionNode]]:
        """Every function and method, in source order."""
        return list(_functions(self.tree.body, ""))


def _functions(body: Iterable[ast.AST], prefix: str) -> Iterator[tuple[FunctionSpan, FunctionNode]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = prefix + node.name
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            yield FunctionSpan(name, first, node.end_lineno), node
            yield from _functions(node.body, f"{name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        else:
            # statements that hold statements; expressions hold no functions with a name
            for field in ("body", "handlers", "orelse", "finalbody", "cases"):
                inner = getattr(node, field, ())
                if isinstance(inner, list):
                    yield from _functions(inner, prefix)
