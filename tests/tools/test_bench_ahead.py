"""`remend bench ahead`: what it makes of measured rounds, what it refuses, and waits of tests."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tools.bench.ahead import compare
from tools.bench.ahead_side import WaitingPool
from tools.cli import main
from tools.simulate import Spread


def side(seconds: float, success: dict[str, float]) -> dict[str, Any]:
    return {"episodes": 100, "seconds": seconds, "learner_idle": 0.5, "success": success}


def test_rates_are_of_all_rounds_and_success_is_paired_by_task() -> None:
    found = {
        "in turn": [side(100, {"a": 0.0, "b": 1.0}), side(300, {"a": 1.0, "b": 1.0})],
        "ahead": [side(100, {"a": 1.0, "b": 1.0}), side(100, {"a": 1.0, "b": 1.0})],
    }
    report = compare(found)
    assert report["in turn"]["episodes_per_h"] == pytest.approx(1800)
    assert report["in turn"]["of_rounds"] == pytest.approx([3600, 1200])
    assert report["ratio"] == pytest.approx(2.0)
    assert report["in turn"]["success"]["mean"] == pytest.approx(0.75)
    assert report["gain"]["mean"] == pytest.approx(0.25) and report["gain"]["n"] == 2


@pytest.mark.parametrize("wrong", ["1", "3,2,9", "a,b,c", "1,2,3,4", "0,1,2"])
def test_a_wait_that_is_none_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ahead", "--tool-s", wrong]) == 2
    assert "MEDIAN,P95,MOST" in capsys.readouterr().err


def test_steps_that_leave_nothing_to_time_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Two at the start are not timed, nor the last ones, when less is under way than before."""
    assert main(["bench", "ahead", "--warmup", "2", "--staleness", "3", "rl.steps=7"]) == 2
    assert "rl.steps must be at least 8: 2 are not timed at the start" in capsys.readouterr().err


def test_only_test_runs_wait() -> None:
    class Inner:
        async def run_tests(self, ids: Any) -> str:
            return "report"

        async def read(self, path: str) -> bytes:
            return b"text"

    class Pool:
        backend = "plain"

        @asynccontextmanager
        async def lease(self, tree: Any):
            yield Inner()

    async def work() -> None:
        pool: Any = WaitingPool(Pool(), Spread(0.05, 0.05), 0)  # type: ignore[arg-type]
        assert pool.backend == "plain"
        async with pool.lease(None) as sandbox:
            began = time.monotonic()
            assert await sandbox.read("a.py") == b"text"
            assert time.monotonic() - began < 0.04
            assert await sandbox.run_tests(["a"]) == "report"
            assert time.monotonic() - began >= 0.05

    asyncio.run(work())
