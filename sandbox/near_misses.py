"""Patches that nearly repair a task: to find out where two ways to judge differ.

gold      the known fix                      noop     nothing
partial   some hunks of the fix              mutated  the fix, with a slip in a function it changes
beside    the fix, and a slip in another function of the same file
guess     a slip in the buggy function, as one who looks for the repair by search would try
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from configs.errors import InputError
from sandbox.mutate import apply, functions, mutations
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
    buggy = {path: data for path, data in task.files().items() if data is not None}
    gold = {p: f.read_bytes() for p in buggy if (f := task.release.tree / p).is_file()}
    partial = list(_partial(buggy, task.gold_patch))
    states = [("gold", gold), ("noop", buggy)]
    states += [("partial", state) for state in draw.sample(partial, min(each, len(partial)))]
    states += [("mutated", state) for state in _slips(gold, buggy, True, draw, each)]
    states += [("beside", state) for state in _slips(gold, buggy, False, draw, each)]
    states += [("guess", state) for state in _slips(buggy, gold, True, draw, each)]
    found: dict[str, Attempt] = {}
    for kind, state in states:
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
    files: dict[str, bytes],
    others: dict[str, bytes],
    inside: bool,
    draw: random.Random,
    count: int,
) -> Iterator[dict[str, bytes]]:
    """`files` with one mutation, in a function that differs from `others`, or in one that does not;
    `count` times at most, each in a function drawn anew."""
    places = []
    for path, data in files.items():
        with contextlib.suppress(InputError, UnicodeDecodeError):
            source, other = data.decode("utf-8"), others.get(path, b"").decode("utf-8")
            touched = _touched(source, other)
            names = {span.name: range(span.line, span.end_line + 1) for span in functions(source)}
            near = {line for name in touched for line in names[name]}
            apart = [name for name, lines in names.items() if near.isdisjoint(lines)]
            chosen = sorted(touched) if inside else apart
            places += [(path, source, name) for name in chosen]
    draw.shuffle(places)
    made = 0
    while places and made < count:
        for path, source, name in list(places):
            edits = mutations(source, name)
            if not edits:
                places.remove((path, source, name))
                continue
            yield files | {path: apply(source, draw.choice(edits)).encode()}
            made += 1
            if made == count:
                return


def _touched(source: str, other: str) -> set[str]:
    """The innermost functions of `source` that hold a difference."""
    codes = opcodes(split_lines(source.encode()), split_lines(other.encode()))
    changed = [range(a + 1, max(a + 1, b) + 1) for tag, a, b, _, _ in codes if tag != "equal"]
    found = set()
    for line in (line for some in changed for line in some):
        around = [span for span in functions(source) if span.line <= line <= span.end_line]
        if around:
            found.add(min(around, key=lambda span: span.end_line - span.line).name)
    return found
