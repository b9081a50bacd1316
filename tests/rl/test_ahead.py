"""The scheduler that lets rollouts run ahead, under a simulated clock: no test here waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.ahead import Ahead, Publisher
from rl.clock import run_simulated


@dataclass(frozen=True)
class Done:
    """A finished episode: its group and place in it, which try, and the version it began with."""

    number: int
    member: int
    tries: int
    version: int


class Loop:
    """A learner and servers that do nothing but take time."""

    def __init__(
        self,
        seconds: Callable[[int, int, int], float],
        *,
        steps: int = 6,
        lag: int = 1,
        size: int = 3,
        spare: int = 0,
        per_step: int = 2,
        learn_s: float = 1.0,
        publish_s: float = 0.0,
    ) -> None:
        self.seconds, self.steps, self.lag = seconds, steps, lag
        self.learn_s, self.publish_s = learn_s, publish_s
        self.version, self.taken, self.waited = 0, [], []  # type: ignore[var-annotated]
        self.started: list[tuple[int, int]] = []  # number, learner's step
        self.step = self.under_way = 0

        def episodes(number: int, tries: int) -> list[Coroutine[Any, Any, Done]]:
            self.started.append((number, self.step))
            return [self.episode(number, m, tries) for m in range(size + spare)]

        self.ahead: Ahead[Done] = Ahead(
            episodes,
            size=size,
            per_step=per_step,
            max_staleness=lag,
            first=0,
            last=steps,
            oldest=lambda done: done.version,
        )

    async def episode(self, number: int, member: int, tries: int) -> Done:
        version = self.version
        self.under_way += 1
        try:
            await asyncio.sleep(self.seconds(number, member, tries))
        finally:
            self.under_way -= 1
        return Done(number, member, tries, version)

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        self.ahead.published(0)
        for step in range(self.steps):
            self.step = step
            began = clock()
            groups = await self.ahead.take(self.step)
            self.waited.append(clock() - began)
            self.taken.append(groups)
            await asyncio.sleep(self.learn_s)
            await asyncio.sleep(self.publish_s)
            self.version = self.step + 1
            self.ahead.published(self.step + 1)
        await self.ahead.close()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 2),
    st.lists(st.floats(0.01, 9.0), min_size=1, max_size=40),
    st.floats(0.0, 3.0),
)
def test_nothing_is_trained_on_that_is_too_old(
    lag: int, spare: int, seconds: list[float], publish_s: float
) -> None:
    """Whatever takes how long: every batch is whole, of distinct groups, and new enough."""
    loop = Loop(
        lambda n, m, t: seconds[(7 * n + m + t) % len(seconds)],
        lag=lag,
        spare=spare,
        publish_s=publish_s,
    )
    run_simulated(loop.run())
    numbers = [group.number for groups in loop.taken for group in groups]
    assert sorted(numbers) == list(range(12))
    for step, groups in enumerate(loop.taken):
        for group in groups:
            assert len(group.done) == 3 and len({d.member for d in group.done}) == 3
            assert all(step - lag <= d.version <= step for d in group.done)
            assert group.oldest == min(d.version for d in group.done)
    # and none began before the version before it was there
    assert all(number < (step + 1 + lag) * 2 for number, step in loop.started)
    assert loop.under_way == 0


def test_with_no_staleness_it_is_rollout_then_learning() -> None:
    loop = Loop(lambda n, m, t: 2.0, lag=0)
    run_simulated(loop.run())
    assert loop.waited == pytest.approx([2.0] * 6)


def test_the_learner_does_not_wait_for_the_slowest() -> None:
    """One group takes as long as five steps; the others go on, and it is sampled anew."""
    loop = Loop(lambda n, m, t: 50.0 if n == 3 and t == 0 else 0.9, lag=2)
    run_simulated(loop.run())
    assert sum(loop.waited) < 3.0
    assert loop.ahead.dropped >= 1
    late = next(g for groups in loop.taken for g in groups if g.number == 3)
    assert all(d.tries > 0 for d in late.done)


def test_spare_episodes_complete_a_group_without_its_slowest() -> None:
    slow = Loop(lambda n, m, t: 9.0 if m == 0 else 1.0, lag=0)
    spare = Loop(lambda n, m, t: 9.0 if m == 0 else 1.0, lag=0, spare=1)
    run_simulated(slow.run())
    run_simulated(spare.run())
    assert slow.waited == pytest.approx([9.0] * 6)
    assert spare.waited == pytest.approx([1.0] * 6)
    assert spare.ahead.cancelled == 12 and spare.under_way == 0


def test_what_an_episode_raises_is_raised() -> None:
    def seconds(number: int, member: int, tries: int) -> float:
        if number == 1:
            raise OSError("the sandbox is gone")
        return 1.0

    with pytest.raises(OSError, match="the sandbox is gone"):
        run_simulated(Loop(seconds).run())


def test_versions_are_written_while_servers_load_the_one_before() -> None:
    """One at a time each, in order; one that would wait behind another is not asked for."""
    log: list[tuple[str, int, float]] = []

    async def run() -> None:
        clock = asyncio.get_running_loop().time

        async def write(copied: Any, version: int) -> Any:
            await asyncio.sleep(2.0)
            log.append(("written", version, clock()))
            return copied

        async def serve(made: Any, version: int) -> None:
            assert made == f"copy of {version}"
            await asyncio.sleep(5.0)
            log.append(("served", version, clock()))

        publisher = Publisher(write, serve)
        for version in range(6):
            if not publisher.full:
                publisher.offer(f"copy of {version}", version)
            await publisher.unless_failed(asyncio.sleep(2.5))
        publisher.offer("copy of 9", 9)
        await publisher.close()

    run_simulated(run())
    assert log == [
        ("written", 0, 2.0),
        ("written", 1, 4.5),
        ("served", 0, 7.0),
        ("written", 3, 9.5),
        ("served", 1, 12.0),
        ("written", 5, 14.5),
        ("written", 9, 17.0),  # to its end, and nothing is served any more
    ]


@pytest.mark.parametrize(("fails", "waits_s"), [("write", 60), ("serve", 60), ("write", 0)])
def test_what_fails_in_publishing_is_raised_where_the_learner_waits(
    fails: str, waits_s: float
) -> None:
    """Or in the end."""

    async def step(name: str) -> None:
        await asyncio.sleep(1.0)
        if name == fails:
            raise OSError(f"cannot {name}")

    async def run() -> None:
        publisher = Publisher(lambda c, v: step("write"), lambda m, v: step("serve"))
        publisher.offer(None, 0)
        await publisher.unless_failed(asyncio.sleep(waits_s))
        await publisher.close()

    with pytest.raises(OSError, match=f"cannot {fails}"):
        run_simulated(run())
