"""An event loop whose clock jumps: what would take hours takes as long as its Python code."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Moves the clock on by the time that the loop would have slept."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("nothing is left to happen: everything waits for something else")
        self.now += max(timeout, 0.0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_simulated(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, whose sleeps cost nothing; raises RuntimeError for a deadlock. Only for code that
    waits for nothing outside itself."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)
