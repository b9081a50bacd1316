"""A tree without the tests that a repair will be judged by, for an agent that shall not know them.

They are taken out of the agent's copy of the test files, function by function; the clean room has
them. What else a file holds, other tests and what those use, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from configs.errors import InputError
from sandbox.base import Tree
from sandbox.checks import Checks
from sandbox.mutate import functions


def without_tests(tree: Tree, ids: Iterable[str]) -> Tree:
    """`tree` with no file that holds one of these tests (pytest ids) in it.

    A file in which one cannot be found, since it is inherited or made at run time, is not there
    at all, nor is one that is no Python source.
    """
    names: dict[str, set[str]] = {}
    for id in ids:
        path, _, name = id.partition("::")
        names.setdefault(path, set()).add(_function(name))
    hidden: dict[str, bytes | None] = {}
    for path, some in names.items():
        data = tree.overlay[path] if path in tree.overlay else (tree.root / path).read_bytes()
        hidden[path] = _without(data or b"", some)
    return replace(tree, overlay={**tree.overlay, **hidden})


def visible(checks: Checks, tree: Tree) -> Checks:
    """What an agent may run of `checks`: the tests that are still there in its `tree`, which
    `without_tests` made of those that fail to pass."""
    gone = {_place(id) for id in checks.fail_to_pass}
    absent = {path for path, data in tree.overlay.items() if data is None}
    rest = [
        id
        for id in checks.pass_to_pass
        if _place(id) not in gone and id.partition("::")[0] not in absent
    ]
    return replace(checks, fail_to_pass=(), pass_to_pass=tuple(rest))


def _function(name: str) -> str:
    """`Class.test` of `Class::test[parameters]`."""
    return name.partition("[")[0].replace("::", ".")


def _place(id: str) -> tuple[str, str]:
    path, _, name = id.partition("::")
    return path, _function(name)


def _without(data: bytes, names: set[str]) -> bytes | None:
    """The source less these functions; None if one of them is not in it."""
    try:
        source = data.decode("utf-8")
        spans = {span.name: span for span in functions(source)}
    except (InputError, UnicodeDecodeError):
        return None
    if not names <= spans.keys():
        return None
    lines = source.split("\n")
    for name in names:
        first, last = spans[name].line - 1, spans[name].end_line
        margin = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        # as many lines as before: those of the other tests keep their numbers
        lines[first:last] = [f"{margin}pass", *[""] * (last - first - 1)]
    return "\n".join(lines).encode()
