"""What to change where a job does not fit: as little as possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.plan.costs import FULL, Costs, by_formula, compiled
from tools.plan.job import Job
from tools.plan.memory import GIB
from tools.plan.search import REMATS, choices, overrides, places

TRIES = 4  # compilations to confirm a choice


def nearest(costs: Costs, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The change that makes it fit: fewer rows at a time, more remat, another mesh, or several.

    Of those with fewest changes the fastest; confirmed by compiling, where one of the first few
    is. Returns {"changes": overrides, "hbm_gib", "compiled"}, None if nothing fits by formula.
    """
    job, place = costs.job, places(costs.job.slice)
    # formulas know nothing of a program's own waste: what one had, others are taken to have
    waste = _waste(costs, by_formula(job, place(job.mesh)))
    found = []
    for choice in choices(job):
        changes, guess = _changes(job, choice), by_formula(choice, place(choice.mesh))
        if changes:
            found.append((len(changes), guess.seconds, changes, choice, guess))
    found.sort(key=lambda item: item[:2])
    first: dict[str, Any] | None = None
    tries = 0
    for _, _, changes, choice, guess in found:
        extra = (waste - 1) * guess.largest.figures.temporaries
        if guess.largest.hbm + extra > FULL * guess.capacity:
            continue
        first = first or _choice(changes, guess, False)
        say(f"to see whether {' '.join(changes)} makes it fit")
        made = compiled(choice, say)
        if made.fits:
            return _choice(changes, made, True)
        waste, tries = max(waste, _waste(made, guess)), tries + 1
        if tries == TRIES:
            break
    return first


def _waste(made: Costs, guess: Costs) -> float:
    """How many times the temporaries of the formula a compiled program has."""
    return max(1.0, made.largest.figures.temporaries / guess.largest.figures.temporaries)


def _changes(job: Job, choice: Job) -> list[str]:
    """What differs; no choice that would keep more than the job did for its backward pass."""
    if choice.microbatch_rows > job.microbatch_rows:
        return []
    kept, now = (REMATS.index(j.model.remat) if j.model.remat in REMATS else len(REMATS)
                 for j in (choice, job))  # fmt: skip
    if kept < now:
        return []
    same = set(overrides(job))
    return [text for text in overrides(choice) if text not in same]


def _choice(changes: list[str], costs: Costs, made: bool) -> dict[str, Any]:
    return {"changes": changes, "hbm_gib": costs.largest.hbm / GIB, "compiled": made}
