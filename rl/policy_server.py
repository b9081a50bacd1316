"""What every policy server does, whichever engine is behind it.

A server samples turns (`Policy`), takes new weights while it runs, and says which version sampled
each token. The in-process engine (``rl/inprocess.py``) and fleets of SGLang (``rl/sglang.py``)
differ in nothing that the loops of ``rl/train.py`` and ``rl/train_ahead.py`` could see.
"""

from __future__ import annotations

from typing import Protocol

from rl.agent import Policy
from rl.probe import Probe
from rl.snapshot import Snapshot


class PolicyServer(Policy, Protocol):
    """A policy whose weights are published to it."""

    async def publish(self, snapshot: Snapshot, probe: Probe | None) -> None:
        """Serve these weights from now on.

        When this returns no token is sampled any more from older weights, except in turns that are
        under way, whose tokens carry their own versions; and what serves has been verified:
        its version, and its log-probabilities of the probe against the learner's.

        Raises ServerError if no replica serves them.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Figures since the last call: `server/*`, see the class."""
        ...

    async def close(self) -> None:
        """End what was started; sessions that are open fail."""
        ...


class ServerError(Exception):
    """The policy server cannot go on. The message says which, and what it answered."""
