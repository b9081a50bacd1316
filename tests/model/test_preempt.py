"""A notice cancels what is under way; without one, work is only work."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from model import preempt


@pytest.fixture
def listening() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    preempt.listen()
    yield
    signal.signal(signal.SIGTERM, before)
    preempt.NOTICE.clear()


def test_sigterm_cancels_work_and_its_cleanup_is_awaited(listening: None) -> None:
    seen = []

    async def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
            return 1
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    assert asyncio.run(preempt.unless_noticed(work())) is None
    assert seen == ["cleaned up"] and preempt.noticed_by_any()


def test_results_and_errors_pass() -> None:
    async def work(value: int) -> int:
        await asyncio.sleep(0)
        return 1 // value

    assert asyncio.run(preempt.unless_noticed(work(1))) == 1
    with pytest.raises(ZeroDivisionError):
        asyncio.run(preempt.unless_noticed(work(0)))
    assert not preempt.noticed_by_any()
