"""Patches that nearly repair a task: to find out where two ways to judge differ.

gold      the known fix                      noop     nothing
partial   some hunks of the fix              mutated  the fix, with a slip in a function it changes
beside    the fix, and a slip in another function of the same file
guess     a slip in the buggy function, as one who looks for the repair by search would try
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from configs.errors import InputError
from sandbox.mutate import Edit, apply, functions, mutations
from sandbox.patch import FileChange, apply_changes, make_patch, opcodes, parse_patch, split_lines
from sandbox.task import Task

KINDS = ("gold", "noop", "partial", "mutated", "beside", "guess")


@dataclass(frozen=True)
class Attempt:
    """A unified diff against the buggy tree, and of what kind it is."""

    kind: str
    patch: str


def near_misses(task: Task, each: int, seed: int) -> list[Attempt]:
    """At most `each` of every kind that there is, drawn by the seed and the task's name.

    The release must be in the cache.
    """
    draw = random.Random(f"{seed} {task.name}")
    found = {task.gold_patch: Attempt("gold", task.gold_patch), "": Attempt("noop", "")}
    buggy = task.files()
    gold = {p: (task.release.tree / p).read_bytes() for p in buggy}
    pools: dict[str, list[dict[str, bytes]]] = {
        "partial": list(_partial(buggy, task.gold_patch)),
        "mutated": list(_slips(gold, buggy, inside=True)),
        "beside": list(_slips(gold, buggy, inside=False)),
        "guess": list(_slips(buggy, gold, inside=True)),
    }
    for kind, states in pools.items():
        for state in draw.sample(states, min(each, len(states))):
            patch = make_patch(buggy, state)
            found.setdefault(patch, Attempt(kind, patch))
    return list(found.values())


def _partial(buggy: dict[str, bytes], patch: str) -> Iterator[dict[str, bytes]]:
    """Each hunk of the fix alone, and the fix less each hunk."""
    changes = parse_patch(patch)
    places = [(at, n) for at, change in enumerate(changes) for n in range(len(change.hunks))]
    if len(places) < 2:
        return
    for place in places:
        for wanted in ([place], [other for other in places if other != place]):
            some = [_only(change, at, wanted) for at, change in enumerate(changes)]
            state = apply_changes(buggy, [change for change in some if change.hunks])
            yield buggy | {path: data for path, data in state.items() if data is not None}


def _only(change: FileChange, at: int, wanted: Sequence[tuple[int, int]]) -> FileChange:
    kept = tuple(hunk for n, hunk in enumerate(change.hunks) if (at, n) in wanted)
    return replace(change, hunks=kept)


def _slips(
    files: dict[str, bytes], others: dict[str, bytes], inside: bool
) -> Iterator[dict[str, bytes]]:
    """`files` with one mutation, inside the functions that differ from `others`, or outside."""
    for path, data in files.items():
        try:
            source, other = data.decode("utf-8"), others[path].decode("utf-8")
            edits = mutations(source)
            touched = _touched(source, other)
        except (InputError, UnicodeDecodeError):
            continue
        for edit in edits:
            if _within(edit, touched) == inside:
                yield files | {path: apply(source, edit).encode()}


def _touched(source: str, other: str) -> list[range]:
    """Lines, from 1, of the innermost functions of `source` that hold a difference."""
    codes = opcodes(split_lines(source.encode()), split_lines(other.encode()))
    lines = {
        line
        for tag, a, b, _, _ in codes
        if tag != "equal"
        for line in range(a + 1, max(a + 1, b) + 1)
    }
    spans = [range(span.line, span.end_line + 1) for span in functions(source)]
    found = []
    for line in lines:
        around = [span for span in spans if line in span]
        if around:
            found.append(min(around, key=len))
    return found


def _within(edit: Edit, touched: Sequence[range]) -> bool:
    return any(edit.line in span for span in touched)
