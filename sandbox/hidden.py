"""Tests that a repair is judged by and that the agent neither has nor runs.

A repair that fits the tests that were shown and no others earns nothing: what cannot be seen cannot
be learnt by heart. They are taken out of the agent's copy of the test files, function by function;
the clean room has them. What else a file holds, other tests and what those use, stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from configs.errors import InputError
from sandbox.base import Tree
from sandbox.checks import Checks
from sandbox.environments import Hide
from sandbox.mutate import functions


class Hiding(Protocol):
    """What of a task decides which of its tests are hidden; see `sandbox.task.Task`."""

    @property
    def name(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def fail_to_pass(self) -> tuple[str, ...]: ...
    @property
    def pass_to_pass(self) -> tuple[str, ...]: ...


def hidden_tests(task: Hiding, hide: Hide) -> tuple[str, ...]:
    """The ids of a task's own tests that are hidden, in their order.

    "failing": those that have to be repaired. A number: that share of the test functions that the
    instruction does not name, drawn by a hash of task and function: the same in every episode, on
    every machine. One that fails is always shown.
    """
    if hide == "failing":
        return task.fail_to_pass
    tests = (*task.fail_to_pass, *task.pass_to_pass)
    named = [test for test in tests if test in task.instruction] or task.fail_to_pass[:1]
    places = {_place(test) for test in tests} - {_place(test) for test in named}

    def draw(place: tuple[str, str]) -> bytes:
        text = "\0".join((task.name, *place))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    drawn = set(sorted(places, key=draw)[: round(hide * len(places))])
    return tuple(test for test in tests if _place(test) in drawn)


def without_tests(tree: Tree, ids: Iterable[str]) -> Tree:
    """`tree` with no file that holds one of these tests (pytest ids) in it.

    A file in which one cannot be found, since it is inherited or made at run time, is not there
    at all, nor is one that is no Python source.
    """
    names: dict[str, set[str]] = {}
    for id in ids:
        path, name = _place(id)
        names.setdefault(path, set()).add(name)
    hidden: dict[str, bytes | None] = {}
    for path, some in names.items():
        data = tree.overlay[path] if path in tree.overlay else (tree.root / path).read_bytes()
        hidden[path] = _without(data or b"", some)
    return replace(tree, overlay={**tree.overlay, **hidden})


def visible(checks: Checks, tree: Tree, hidden: Iterable[str]) -> Checks:
    """What an agent may run of `checks`: the tests that are still there in its `tree`, which
    `without_tests` made of `hidden`."""
    gone = {_place(id) for id in hidden}
    absent = {path for path, data in tree.overlay.items() if data is None}

    def there(ids: Iterable[str]) -> tuple[str, ...]:
        places = ((id, _place(id)) for id in ids)
        return tuple(id for id, at in places if at not in gone and at[0] not in absent)

    found = there(checks.fail_to_pass), there(checks.pass_to_pass)
    return replace(checks, fail_to_pass=found[0], pass_to_pass=found[1])


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
