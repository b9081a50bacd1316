"""Credit for single turns, beside the outcome of the whole episode.

The verdict says little about a turn: most episodes of a weak policy fail, whatever else they did
well. Whether a turn put a new edit to the test is known at once, and says it of that turn's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.agent_tools import EDITED
from sft.trajectory import Trajectory


def turn_credits(group: Sequence[Trajectory], weight: float) -> list[list[float]]:
    """For each episode of one task, each turn's credit: weight × (f - mean of f in the group),
    where f is 1 if the turn tested a new edit, 0 if it edited in vain; 0 for turns without edits.
    """
    fresh = [fresh_turns(trajectory) for trajectory in group]
    known = [f for turns in fresh for f in turns if f is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [[0.0 if f is None else weight * (f - mean) for f in turns] for turns in fresh]


def fresh_turns(trajectory: Trajectory) -> list[bool | None]:
    """For each turn: did it apply an edit that differs from all earlier ones, and then run the
    tests? None if it tried no edit. A turn with a call that could not be read tested nothing."""
    tried: set[tuple[str, ...]] = set()
    found: list[bool | None] = []
    for turn in trajectory.turns:
        if len(turn.calls) != len(turn.observations):
            found.append(False)
            continue
        untested = tested = False
        for call, observation in zip(turn.calls, turn.observations, strict=True):
            arguments = call["arguments"]
            if call["name"] == "edit" and observation == EDITED:
                edit = tuple(str(arguments.get(k, "")) for k in ("path", "symbol", "old", "new"))
                untested |= edit not in tried
                tried.add(edit)
            tested |= call["name"] == "run_tests" and untested
        edits = any(call["name"] == "edit" for call in turn.calls)
        found.append(tested if edits else None)
    return found
