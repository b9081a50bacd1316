"""The independent fixes in what changed between two releases, told by the tests."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sandbox.coverage import one_of_each
from sandbox.failures import kind
from sandbox.hunks import Hunk
from sandbox.split import ddmin, same_tests, split
from sandbox.taken_back import FEW_TESTS, TakenBack

Piece = tuple[Hunk, ...]
_GROWN_BY = 6  # tests that a piece is grown by


@dataclass(frozen=True)
class Difference:
    """What the tests say of two releases.

    Attributes:
      versions: of the newer and the older one.
      hunks: all that changed between them.
      passing: tests that pass on the newer one.
      broken: those of them that fail on the older one.
      bugs: those of these whose failure is a bug, in order.
    """

    versions: tuple[str, str]
    hunks: tuple[Hunk, ...]
    passing: list[str]
    broken: frozenset[str]
    bugs: list[str]


async def find_pieces(
    change: Difference, taken_back: TakenBack, max_runs: int, max_s: float
) -> list[tuple[Piece, ...]]:
    """The independent fixes, smallest first; each as what may be taken back for it, the most likely
    first. Looks no further after about `max_runs` runs, or `max_s` seconds."""
    if len(change.hunks) == 1:
        return []
    ends = time.monotonic() + max_s

    async def failing(some: Sequence[Hunk], tests: Sequence[str]) -> set[str]:
        felt = taken_back.feeling(some, tests)
        if not felt or time.monotonic() > ends:
            return set()
        found = await taken_back.cases(some, felt)
        return {id for id, case in found.items() if case.outcome in ("failed", "error")}

    # one of each parametrised test is enough to tell the hunks apart
    tests = one_of_each(change.bugs)[:FEW_TESTS]
    alone = [hunk for hunk in change.hunks if taken_back.feeling([hunk], tests)]
    pieces = same_tests(await split(change.hunks, alone, tests, failing, max_runs))
    return sorted(
        pieces, key=lambda ways: (len(ways[0]), sum(hunk.lines for hunk in ways[0]), ways)
    )


async def failing_with(
    change: Difference, taken_back: TakenBack, piece: Collection[Hunk], tests: Sequence[str]
) -> tuple[set[str], set[str]]:
    """The tests that fail with a piece taken back, and those of them that fail otherwise than on
    the older release: they pass there, or show a bug there and here only a missing name."""
    felt = taken_back.feeling(piece, tests)
    cases = await taken_back.cases(piece, felt) if felt else {}
    failing = {id: case for id, case in cases.items() if case.outcome != "passed"}
    bugs = set(change.bugs)
    more = {
        id
        for id, case in failing.items()
        if id not in change.broken or (id in bugs and kind(case, change.versions) != "bug")
    }
    return set(failing), more


async def grow(
    change: Difference, taken_back: TakenBack, piece: Piece, more: Collection[str], max_runs: int
) -> Piece:
    """A piece with the fewest other hunks that have to go with it, so that the tests in `more`,
    which it breaks, end as they do on the older release.

    Where a fix adds a function in one place and calls it in another, the one cannot be taken back
    without the other.
    """
    others = [hunk for hunk in change.hunks if hunk not in piece]
    tests = one_of_each(sorted(more))[:_GROWN_BY]

    async def mended(some: Sequence[Hunk], same: Sequence[str]) -> set[str]:
        _, still = await failing_with(change, taken_back, [*piece, *some], tests)
        return set() if still else {""}

    added, _ = await ddmin(others, "", mended, max_runs)
    return tuple(sorted([*piece, *added]))
