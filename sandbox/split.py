"""A source diff taken apart: which hunks, taken back alone, make which tests fail.

After A. Zeller and R. Hildebrandt, Simplifying and Isolating Failure-Inducing Input (2002): single
hunks first, then `ddmin` for the tests that no single hunk explains.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from sandbox.hunks import Hunk

# which of the tests asked for fail with these hunks taken back
Failing = Callable[[Sequence[Hunk], Sequence[str]], Awaitable[set[str]]]
Found = tuple[tuple[Hunk, ...], set[str]]


async def split(
    hunks: Sequence[Hunk],
    alone: Sequence[Hunk],
    tests: Sequence[str],
    failing: Failing,
    max_runs: int,
) -> list[Found]:
    """Small sets of hunks, each with the tests that fail when it is taken back.

    `alone`: those of the hunks that may make a test fail by themselves. A test may fail through
    several pieces. At most about `max_runs` calls of `failing`: when they are used up, what is left
    unexplained stays so. One hunk alone needs no call.
    """
    if len(hunks) == 1:
        return [(tuple(hunks), set(tests))]
    runs = 0
    pieces: list[Found] = []
    explained: set[str] = set()
    for hunk in alone:
        if runs >= max_runs:
            return pieces
        runs += 1
        found = await failing([hunk], tests)
        if found:
            pieces.append(((hunk,), found))
            explained |= found
    for test in tests:
        if test in explained:
            continue
        if runs >= max_runs:
            break
        smallest, used = await ddmin(hunks, test, failing, max_runs - runs)
        runs += used
        if len(smallest) < len(hunks):
            found = await failing(smallest, [t for t in tests if t not in explained])
            if test in found:  # always so, for tests that are steady
                pieces.append((tuple(smallest), found))
            explained |= found | {test}
    return pieces


def same_tests(pieces: Sequence[Found]) -> list[tuple[tuple[Hunk, ...], ...]]:
    """Pieces that make the same tests fail are one fix in several places: all of them together,
    then, for where that does not hold, the two largest by themselves."""
    groups: dict[frozenset[str], list[tuple[Hunk, ...]]] = {}
    for piece, tests in pieces:
        groups.setdefault(frozenset(tests), []).append(piece)
    found = []
    for parts in groups.values():
        together = tuple(sorted({hunk for part in parts for hunk in part}))
        singly = sorted(set(parts), key=lambda part: (-sum(hunk.lines for hunk in part), part))
        found.append((together, *[part for part in singly if part != together][:2]))
    return found


async def ddmin(
    hunks: Sequence[Hunk], test: str, failing: Failing, max_runs: int
) -> tuple[list[Hunk], int]:
    """A set of hunks none of which can be left out if `test` is to fail, and the calls it took.

    When the calls run out, the smallest failing set so far.
    """
    left, parts, runs = list(hunks), 2, 0
    while len(left) > 1:
        size = -(-len(left) // parts)
        subsets = [left[i : i + size] for i in range(0, len(left), size)]
        smaller: list[Hunk] | None = None
        candidates = subsets if parts == 2 else []
        candidates = candidates + [[h for h in left if h not in set(s)] for s in subsets]
        for candidate in candidates if len(subsets) > 1 else subsets:
            if runs >= max_runs:
                return left, runs
            runs += 1
            if candidate and len(candidate) < len(left) and await failing(candidate, [test]):
                smaller = candidate
                break
        if smaller is not None:
            left, parts = smaller, max(parts - 1, 2)
        elif parts >= len(left):
            return left, runs
        else:
            parts = min(len(left), parts * 2)
    return left, runs
