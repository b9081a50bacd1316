"""What an episode's verdict earns in training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sft.trajectory import Trajectory


@dataclass(frozen=True)
class RewardConfig:
    """Attributes:
    guard: a patch that passes its tests and looks like an exploit (`sandbox/guard.py`) earns
      nothing. False is for one experiment only, in which policies are trained to exploit their
      reward so that this can be measured: such a policy is not one to use. Verdicts, success and
      evaluations are the same either way.
    """

    guard: bool = True


UNGUARDED = (
    "reward.guard is off: patches that look like exploits earn the full reward. For measuring what "
    "the guard prevents, and nothing else; do not use the policy that comes out"
)


def paid(episodes: Iterable[Trajectory], config: RewardConfig) -> list[Trajectory]:
    """The episodes with what they earn: 1 for a passing verdict, and, without the guard, for one
    that was quarantined."""
    found = list(episodes)
    for episode in found:
        if not config.guard and episode.verdict.get("verdict") == "quarantine":
            episode.reward = 1.0
    return found
