"""The two environments that one task can be repaired, and judged, in.

    simplified   the module under repair, the task's own tests, five tools, no shell
    full         the whole repository: a build, every test of it that passes on the release, a shell

Both have the same tree in the same kind of sandbox; what differs is what the agent may do there,
and what decides (`sandbox.checks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.errors import InputError

Environment = Literal["simplified", "full"]
Hide = float | Literal["failing"]
ENVIRONMENTS: tuple[Environment, ...] = ("simplified", "full")


def other(environment: Environment) -> Environment:
    """The other one of the two."""
    return "full" if environment == "simplified" else "simplified"


@dataclass(frozen=True)
class Setting:
    """Where episodes take place, and who judges them.

    Attributes:
      environment: what the agent has, and whose verdict is the reward.
      judge_both: find the other environment's verdict on the same diff, too.
      hide_tests: which tests the agent's tree lacks and the verdict wants all the same
        (`sandbox.hidden.hidden_tests`); 0: none.
      shell_without_isolation: the user accepts a shell in the plain sandbox.
    """

    environment: Environment = "simplified"
    judge_both: bool = False
    hide_tests: Hide = 0.0
    shell_without_isolation: bool = False

    def __post_init__(self) -> None:
        if self.hide_tests != "failing" and not 0 <= self.hide_tests <= 1:
            raise InputError(f"hide_tests is a share from 0 to 1, or failing: {self.hide_tests}")

    @property
    def shell(self) -> bool:
        """Whether the agent has one."""
        return self.environment == "full"

    def refuse_bare_shell(self, backend: str) -> None:
        """Raise InputError if the agent has a shell that this backend does not isolate."""
        if self.shell and backend == "plain" and not self.shell_without_isolation:
            raise InputError(
                "environment=full gives the policy a shell, and the plain sandbox does not "
                "isolate it from this machine's files: install bubblewrap, use "
                "sandbox.backend=docker, or accept it: sandbox.shell_without_isolation=true"
            )


SIMPLIFIED = Setting()
