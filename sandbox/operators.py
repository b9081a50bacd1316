"""The mutation operators: small slips that programmers really make.

Each operator looks at one syntax node and yields `Cut`s, every one inside a single line. Most
come in pairs that undo each other, so that a repairer which applies the same operators to a buggy
function meets the original text again; `REVERSIBLE` names those for which this always holds
(up to spacing). For the others it holds sometimes: dropping `return x` can be undone when `x` is
a plain name, dropping `return f(x)` cannot.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from sandbox.source import Code, Cut, FunctionNode

Cuts = Iterator[Cut | None]


class Scope:
    """A function under mutation: its module's code, its node and the names it binds."""

    def __init__(self, code: Code, node: FunctionNode) -> None:
        self.code = code
        self.node = node
        self.bound = bound_names(node)

    def names_before(self, line: int) -> list[str]:
        """Parameters, and locals first assigned on an earlier line; sorted."""
        return sorted(name for name, first in self.bound.items() if first < line)


_BOUNDARY = {"<": ["<="], "<=": ["<"], ">": [">="], ">=": [">"]}
_COMPARISON = {
    "==": ["!="], "!=": ["=="], "<": [">"], ">": ["<"], "<=": [">="], ">=": ["<="],
    "is": ["is not"], "is not": ["is"], "in": ["not in"], "not in": ["in"],
}  # fmt: skip
_ARITHMETIC = {
    "+": ["-"], "-": ["+"], "*": ["/", "//"], "/": ["*", "//"], "//": ["*", "/", "%"],
    "%": ["//"], "<<": [">>"], ">>": ["<<"], "&": ["|"], "|": ["&"],
}  # fmt: skip
_AUGMENTED = {
    "=": ["+=", "-="], "+=": ["-=", "="], "-=": ["+=", "="], "*=": ["//="], "//=": ["*="],
    "|=": ["&="], "&=": ["|="],
}  # fmt: skip
_BOOLEAN = {"and": ["or"], "or": ["and"]}


def _symmetric(*pairs: str) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for pair in pairs:
        a, b = pair.split("|")
        table.setdefault(a, []).append(b)
        table.setdefault(b, []).append(a)
    return table


_CALLS = _symmetric(
    "min|max", "any|all", "startswith|endswith", "strip|lstrip", "strip|rstrip", "lstrip|rstrip",
    "lower|upper", "islower|isupper", "isdigit|isalpha", "find|rfind", "index|rindex",
    "split|rsplit", "partition|rpartition", "ljust|rjust", "keys|values", "items|keys",
    "append|extend", "append|appendleft", "pop|popleft", "add|discard", "union|intersection",
    "floor|ceil", "match|search", "match|fullmatch", "get|setdefault", "sorted|list",
    "isinstance|issubclass", "removeprefix|removesuffix", "takewhile|dropwhile",
)  # fmt: skip
_EXCEPTIONS = _symmetric(
    "ValueError|TypeError", "KeyError|IndexError", "KeyError|AttributeError", "KeyError|ValueError",
    "StopIteration|IndexError", "OSError|ValueError",
)  # fmt: skip
_STRINGS = _symmetric("| ", "-|_", ",|, ", "\\n| ", "\\n|", ".|,", "'|\"")


def _swap_operator(
    code: Code, left: ast.expr, right: ast.expr, table: dict[str, list[str]]
) -> Cuts:
    tokens = code.between(left, right)
    if not tokens:
        return
    for new in table.get(" ".join(token.text for token in tokens), ()):
        yield code.cut(tokens[0].start, tokens[-1].end, new)


def boundary(scope: Scope, node: ast.AST) -> Cuts:
    """`<` and `<=`, `>` and `>=`."""
    yield from _compare(scope, node, _BOUNDARY)


def comparison(scope: Scope, node: ast.AST) -> Cuts:
    """`==` and `!=`, `<` and `>`, `is` and `is not`, `in` and `not in`."""
    yield from _compare(scope, node, _COMPARISON)


def _compare(scope: Scope, node: ast.AST, table: dict[str, list[str]]) -> Cuts:
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, right in zip(operands, operands[1:], strict=False):
            yield from _swap_operator(scope.code, left, right, table)


def arithmetic(scope: Scope, node: ast.AST) -> Cuts:
    """One arithmetic or bit operator for a neighbour, unless a literal string is an operand."""
    if isinstance(node, ast.BinOp) and not (_is_text(node.left) or _is_text(node.right)):
        yield from _swap_operator(scope.code, node.left, node.right, _ARITHMETIC)


def operands(scope: Scope, node: ast.AST) -> Cuts:
    """`a - b` as `b - a`, for operators that do not commute and operands that are atoms."""
    if isinstance(node, ast.BinOp) and isinstance(
        node.op, ast.Sub | ast.Div | ast.FloorDiv | ast.Mod
    ):
        if not _is_text(node.left) and _is_atom(node.left) and _is_atom(node.right):
            yield _swap(scope.code, node.left, node.right)


def boolean(scope: Scope, node: ast.AST) -> Cuts:
    """`and` and `or`, one at a time."""
    if isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from _swap_operator(scope.code, left, right, _BOOLEAN)


def condition(scope: Scope, node: ast.AST) -> Cuts:
    """Forget one operand of `and` / `or`."""
    if isinstance(node, ast.BoolOp):
        extents = [scope.code.wrapped(value) for value in node.values]
        yield scope.code.cut(extents[0][0], extents[1][0], "")
        for (_, previous_end), (_, end) in zip(extents, extents[1:], strict=False):
            yield scope.code.cut(previous_end, end, "")


def negation(scope: Scope, node: ast.AST) -> Cuts:
    """Drop a `not`; put a `not` before a condition or before one operand of it."""
    code = scope.code
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        following = code.tokens[code.first_token(code.start(node)) + 1]
        yield code.cut(code.start(node), following.start, "")
    tests: list[ast.expr] = []
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        tests.append(node.test)
    elif isinstance(node, ast.comprehension):
        tests.extend(node.ifs)
    elif isinstance(node, ast.Return) and node.value is not None:
        if not isinstance(node.value, ast.Constant | ast.Tuple):
            tests.append(node.value)
    for test in tests:
        for operand in _conjuncts(test):
            start, _ = code.wrapped(operand)
            simple = ast.Name | ast.Attribute | ast.Call | ast.Subscript
            if start != code.start(operand) or isinstance(operand, simple):
                yield code.cut(start, start, "not ")


def _conjuncts(test: ast.expr) -> Iterator[ast.expr]:
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _conjuncts(value)
    yield test


def constant(scope: Scope, node: ast.AST) -> Cuts:
    """An integer off by one; `True` and `False`."""
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if isinstance(value, bool):
        yield scope.code.replace(node, str(not value))
    elif isinstance(value, int) and scope.code.segment(node) == str(value):
        yield scope.code.replace(node, str(value + 1))
        if value > 0:
            yield scope.code.replace(node, str(value - 1))


def string(scope: Scope, node: ast.AST) -> Cuts:
    """A separator for a similar one: `""` and `" "`, `"-"` and `"_"`, …"""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        literal = re.fullmatch(r"(['\"])(.{0,2})\1", scope.code.segment(node) or "")
        if literal:
            quote, content = literal.groups()
            for new in _STRINGS.get(content, ()):
                if new != quote:
                    yield scope.code.replace(node, f"{quote}{new}{quote}")


def variable(scope: Scope, node: ast.AST) -> Cuts:
    """A parameter or local for another one that is assigned on an earlier line.

    Called once for each function, with its own node.
    """
    if node is scope.node:
        for load, hidden in _own_loads(scope.node.body):
            names = [name for name in scope.names_before(load.lineno) if name not in hidden]
            if load.id in names:
                for name in names:
                    if name != load.id:
                        yield scope.code.replace(load, name)


def arguments(scope: Scope, node: ast.AST) -> Cuts:
    """Two neighbouring positional arguments, or two neighbours in a returned tuple, swapped."""
    if isinstance(node, ast.Call):
        items = node.args
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        items = node.value.elts
    else:
        return
    for left, right in zip(items, items[1:], strict=False):
        if not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred):
            yield _swap(scope.code, left, right)


def early_exit(scope: Scope, node: ast.AST) -> Cuts:
    """A `return`, `raise`, `continue` or `break` forgotten (`pass` in its place), and back."""
    if isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break):
        if node is not scope.node.body[-1]:
            yield scope.code.replace(node, "pass")
    elif isinstance(node, ast.Pass):
        plain = ["continue", "break", "return", "return None", "return True", "return False"]
        for new in plain + [f"return {name}" for name in scope.names_before(node.lineno)]:
            yield scope.code.replace(node, new)


def return_value(scope: Scope, node: ast.AST) -> Cuts:
    """`return x` as `return None`; `return None` as `return x` for each name in reach."""
    if not isinstance(node, ast.Return) or node.value is None:
        return
    if isinstance(node.value, ast.Constant) and node.value.value is None:
        for name in scope.names_before(node.lineno):
            yield scope.code.replace(node.value, name)
    else:
        yield scope.code.replace(node.value, "None")


def index(scope: Scope, node: ast.AST) -> Cuts:
    """`x[0]` and `x[-1]`; `x[a:]` and `x[:a]`."""
    if not isinstance(node, ast.Subscript):
        return
    code, item = scope.code, node.slice
    if isinstance(item, ast.Slice):
        if item.lower and not item.upper and not item.step:
            yield code.replace(item, f":{code.segment(item.lower)}")
        elif item.upper and not item.lower and not item.step:
            yield code.replace(item, f"{code.segment(item.upper)}:")
    elif isinstance(item, ast.expr) and code.segment(item) in ("0", "-1"):
        yield code.replace(item, "-1" if code.segment(item) == "0" else "0")


def off_by_one(scope: Scope, node: ast.AST) -> Cuts:
    """Add or forget `+ 1` / `- 1` in an index, a slice bound, a `range` or an order comparison."""
    places: list[ast.expr | None] = []
    if isinstance(node, ast.Subscript):
        places.append(node.slice)
    elif isinstance(node, ast.Slice):
        places.extend([node.lower, node.upper])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        places.extend(node.args)
    elif isinstance(node, ast.Compare):
        ordered = ast.Lt | ast.LtE | ast.Gt | ast.GtE
        pairs = zip(node.ops, node.comparators, strict=True)
        places.extend(right for op, right in pairs if isinstance(op, ordered))
    code = scope.code
    for place in places:
        if isinstance(place, ast.Name | ast.Attribute | ast.Call):
            yield code.cut(code.end(place), code.end(place), " + 1")
            yield code.cut(code.end(place), code.end(place), " - 1")
        elif isinstance(place, ast.BinOp) and isinstance(place.op, ast.Add | ast.Sub):
            if isinstance(place.right, ast.Constant) and place.right.value == 1:
                yield code.cut(code.wrapped(place.left)[1], code.end(place), "")


def method(scope: Scope, node: ast.AST) -> Cuts:
    """A called function or method for its sibling: `min` and `max`, `lstrip` and `rstrip`, …"""
    if not isinstance(node, ast.Call):
        return
    code, called = scope.code, node.func
    if isinstance(called, ast.Name):
        for new in _CALLS.get(called.id, ()):
            yield code.replace(called, new)
    elif isinstance(called, ast.Attribute):
        line, end = code.end(called)
        for new in _CALLS.get(called.attr, ()):
            yield Cut(line, end - len(called.attr), end, new)


def augmented(scope: Scope, node: ast.AST) -> Cuts:
    """`+=` for `-=` or `=`, and back."""
    if isinstance(node, ast.AugAssign):
        yield from _swap_operator(scope.code, node.target, node.value, _AUGMENTED)
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
        known = isinstance(target, ast.Name) and target.id in scope.names_before(node.lineno)
        if known or isinstance(target, ast.Attribute | ast.Subscript):
            yield from _swap_operator(scope.code, target, node.value, _AUGMENTED)


def ternary(scope: Scope, node: ast.AST) -> Cuts:
    """`a if c else b` as `b if c else a`."""
    if isinstance(node, ast.IfExp):
        yield _swap(scope.code, node.body, node.orelse)


def exception(scope: Scope, node: ast.AST) -> Cuts:
    """A built-in exception for a related one, where it is raised or caught."""
    kinds: list[ast.expr | None] = []
    if isinstance(node, ast.ExceptHandler):
        kinds = list(node.type.elts) if isinstance(node.type, ast.Tuple) else [node.type]
    elif isinstance(node, ast.Raise):
        kinds = [node.exc.func if isinstance(node.exc, ast.Call) else node.exc]
    for kind in kinds:
        if isinstance(kind, ast.Name):
            for new in _EXCEPTIONS.get(kind.id, ()):
                yield scope.code.replace(kind, new)


OPERATORS: dict[str, Callable[[Scope, ast.AST], Cuts]] = {
    operator.__name__: operator
    for operator in (
        arguments, arithmetic, augmented, boolean, boundary, comparison, condition, constant,
        early_exit, exception, index, method, negation, off_by_one, operands, return_value, string,
        ternary, variable,
    )
}  # fmt: skip

REVERSIBLE = frozenset(OPERATORS) - {
    "augmented", "condition", "early_exit", "negation", "off_by_one", "return_value",
}  # fmt: skip


def _swap(code: Code, left: ast.expr, right: ast.expr) -> Cut | None:
    """Exchange the texts of two nodes on one line."""
    (line, start), (last, end) = code.start(left), code.end(right)
    a, b = code.segment(left), code.segment(right)
    if line != last or a is None or b is None:
        return None
    middle = code.lines[line - 1][code.end(left)[1] : code.start(right)[1]]
    return Cut(line, start, end, b + middle + a)


def _is_text(node: ast.expr) -> bool:
    constant_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return constant_text or isinstance(node, ast.JoinedStr)


def _is_atom(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Constant | ast.Subscript)


def bound_names(function: FunctionNode) -> dict[str, int]:
    """Names a function binds itself, with the line of the first binding; parameters get line 0.

    `self` and `cls` are left out: no one mistakes them for another name.
    """
    names: dict[str, int] = {}
    hidden: set[str] = {"self", "cls", "_"}
    for node in _own_nodes(function.body):
        if isinstance(node, ast.Global | ast.Nonlocal):
            hidden.update(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = min(node.lineno, names.get(node.id, node.lineno))
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names[node.name] = min(node.lineno, names.get(node.name, node.lineno))
    spec = function.args
    for argument in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]:
        if argument is not None:
            names[argument.arg] = 0
    return {name: line for name, line in names.items() if name not in hidden}


_INNER_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def _own_nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node of a function body that runs in the function's own scope."""
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        node = stack.pop()
        if isinstance(node, _INNER_SCOPES | _COMPREHENSIONS):
            continue
        yield node
        stack.extend(reversed(list(ast.iter_child_nodes(node))))


def _own_loads(nodes: list[ast.stmt]) -> Iterator[tuple[ast.Name, frozenset[str]]]:
    """Names read by a function body, each with the names that a comprehension around it binds
    for itself. Called names and annotations are left out."""
    stack: list[tuple[ast.AST, frozenset[str]]] = [(node, frozenset()) for node in reversed(nodes)]
    while stack:
        node, hidden = stack.pop()
        if isinstance(node, _INNER_SCOPES | ast.JoinedStr):
            continue
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                yield node, hidden
            continue
        if isinstance(node, _COMPREHENSIONS):
            targets = (name for part in node.generators for name in ast.walk(part.target))
            hidden = hidden | {name.id for name in targets if isinstance(name, ast.Name)}
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            children.remove(node.func)
        if isinstance(node, ast.AnnAssign):
            children.remove(node.annotation)
        stack.extend((child, hidden) for child in reversed(children))
