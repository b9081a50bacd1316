"""What an episode is worth to the learner."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import InputError
from sandbox.agent_tools import EDITED
from sft.trajectory import Trajectory

MAX_EFFORT = 0.5  # of a failed episode: never near that of a repair


@dataclass(frozen=True)
class RewardConfig:
    """Attributes:
    effort: what each tested try of a failed episode earns, in all at most `MAX_EFFORT`; 0 leaves
      the verdict alone.
    """

    effort: float = 0.0

    def __post_init__(self) -> None:
        if self.effort < 0:
            raise InputError(f"reward.effort must not be negative, got {self.effort}")


def reward(trajectory: Trajectory, config: RewardConfig) -> float:
    """1 for a verdict of "pass"; else the effort, which tells apart the episodes of a group that
    has no success at all: those that gave up, quoted code that is not there or tried the same again
    from those that searched on."""
    if trajectory.success:
        return 1.0
    return min(MAX_EFFORT, config.effort * count_tries(trajectory))


def count_tries(trajectory: Trajectory) -> int:
    """Edits that applied, differ from every earlier one, and were followed by a test run.

    Several edits before one run count once.
    """
    tried: set[tuple[str, ...]] = set()
    untested, count = False, 0
    for turn in trajectory.turns:
        if len(turn.calls) != len(turn.observations):
            continue  # a malformed call among them: which answer is whose is not on record
        for call, observation in zip(turn.calls, turn.observations, strict=True):
            arguments = call["arguments"]
            if call["name"] == "edit" and observation == EDITED:
                edit = tuple(str(arguments.get(k, "")) for k in ("path", "symbol", "old", "new"))
                untested |= edit not in tried
                tried.add(edit)
            elif call["name"] == "run_tests" and untested:
                untested, count = False, count + 1
    return count
