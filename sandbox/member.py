"""One host of a pool of Docker hosts: its sandboxes, and how it does."""

from __future__ import annotations

import time

from sandbox.container import ContainerSlot
from sandbox.docker import Engine

STARTS = 2  # at one time: they cost it CPU
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0


class Member:
    """An engine, its slots, and whether to use it.

    Attributes:
      up: whether it is in use; if not, `why`.
      failures: starts of sandboxes that failed, in a row.
      proven: whether a sandbox has started since it was last out of use.
      outages: how often it was put out of use.
      checked: when it last answered (monotonic seconds).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.up = False
        self.slots: set[ContainerSlot] = set()
        self.starting = 0
        self.failures = 0
        self.proven = False
        self.why = "not connected yet"
        self.outages = 0
        self.checked = time.monotonic()
        self._retry_at, self._backoff = 0.0, BACKOFF_S

    @property
    def held(self) -> int:
        return len(self.slots) + self.starting

    @property
    def load(self) -> float:
        return self.held / self.engine.capacity if self.engine.capacity else 1.0

    def may_start(self) -> bool:
        return self.up and self.starting < STARTS and self.held < self.engine.capacity

    def quarantine(self, why: str) -> bool:
        """Out of use, for twice as long as last time if nothing worked in between; whether that is
        news."""
        news = self.proven or not self.outages
        self.up, self.proven, self.why, self.failures = False, False, why, 0
        self.outages += 1
        self.postpone()
        return news

    def postpone(self) -> None:
        """Ask it again later."""
        self._retry_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, MAX_BACKOFF_S)

    def due(self) -> bool:
        return not self.up and time.monotonic() >= self._retry_at

    def answered(self) -> None:
        """It can be reached: worth a try."""
        self.up, self.failures = True, 0
        self.checked = time.monotonic()

    def started(self) -> bool:
        """A sandbox has started there; whether it is back by that."""
        back = not self.proven and self.outages > 0
        self.proven, self.failures, self._backoff, self.why = True, 0, BACKOFF_S, ""
        return back

    def containers(self) -> set[str]:
        """What it runs for us."""
        return {slot.container for slot in self.slots if slot.container}
