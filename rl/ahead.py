"""Rollouts that run ahead of the learner, by no more versions than allowed.

Groups of episodes are numbered; group i may start once

    i < (published + 1 + max_staleness) * per_step

where `published` is the newest version that the servers have (Fu et al. 2025, AReaL, arXiv
2505.24298, section 5.1, counting groups). So a group started with version p is needed, in order, by
step p + max_staleness at the latest. The learner takes whichever groups are done, the lowest
numbers first, and so never waits for a slow one while enough others are there; a group that was
overtaken until its oldest token became too old is cancelled, and started anew with newer weights.

Knows nothing of models: `tools/simulate.py` runs this very code under a simulated clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass
class Group(Generic[T]):
    """Episodes of one task: `done`, in the order in which they ended, and the oldest version that
    sampled a token of them."""

    number: int
    oldest: int
    done: list[T]


class Ahead(Generic[T]):
    """See the module's docstring.

    Args:
      episodes: of a group, by its number and how often it was started before; as many as there are
        to be, spare ones included.
      size: episodes that complete a group; the rest are cancelled.
      per_step: groups that the learner takes at a time.
      first, last: groups `first * per_step` up to, not including, `last * per_step` are run.
      oldest: the oldest version in an episode.
    """

    def __init__(
        self,
        episodes: Callable[[int, int], Sequence[Coroutine[Any, Any, T]]],
        *,
        size: int,
        per_step: int,
        max_staleness: int,
        first: int,
        last: int,
        oldest: Callable[[T], int],
    ) -> None:
        self._episodes, self._size, self._per_step = episodes, size, per_step
        self._lag, self._oldest = max_staleness, oldest
        self._next, self._end = first * per_step, last * per_step
        self._published = -1
        self._running: dict[int, tuple[int, asyncio.Task[list[T]]]] = {}  # number: version, task
        self._ready: dict[int, Group[T]] = {}
        self._starts: dict[int, int] = {}
        self._news = asyncio.Event()
        self._failed: BaseException | None = None
        self.dropped = 0  # groups that became too old
        self.cancelled = 0  # episodes that were not needed to complete a group

    @property
    def ready(self) -> int:
        """Groups that are done and wait for the learner."""
        return len(self._ready)

    def published(self, version: int) -> None:
        """The servers have this version now: more groups may start."""
        self._published = version
        while self._next < min(self._end, (version + 1 + self._lag) * self._per_step):
            self._start(self._next)
            self._next += 1

    async def take(self, version: int) -> list[Group[T]]:
        """`per_step` groups for a learner that is at `version`, none with tokens older than
        allowed; waits until there are so many. Raises what an episode raised."""
        while True:
            if self._failed is not None:
                raise self._failed
            self._renew(version)
            if len(self._ready) >= self._per_step:
                return [self._ready.pop(n) for n in sorted(self._ready)[: self._per_step]]
            self._news.clear()
            await self._news.wait()

    async def close(self) -> None:
        """Cancel what runs, and wait until it has ended."""
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _renew(self, version: int) -> None:
        """Start anew the groups that have become too old."""
        stale = [n for n, group in self._ready.items() if group.oldest < version - self._lag]
        for number in stale:
            del self._ready[number]
        slow = [n for n, (v, _) in self._running.items() if v < version - self._lag]
        for number in slow:
            _, task = self._running.pop(number)
            task.cancel()
        for number in sorted(stale + slow):
            self.dropped += 1
            self._start(number)

    def _start(self, number: int) -> None:
        tries = self._starts[number] = self._starts.get(number, -1) + 1
        task = asyncio.create_task(self._group(number, tries))
        self._running[number] = self._published, task
        task.add_done_callback(lambda done: self._ended(number, done))

    def _ended(self, number: int, task: asyncio.Task[list[T]]) -> None:
        version, current = self._running.get(number, (0, None))
        if current is not task:  # dropped
            return
        del self._running[number]
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._failed = error
        else:
            done = task.result()
            oldest = min(self._oldest(episode) for episode in done)
            self._ready[number] = Group(number, oldest if oldest >= 0 else version, done)
        self._news.set()

    async def _group(self, number: int, tries: int) -> list[T]:
        """The first `size` episodes of a group that end."""
        tasks = [asyncio.create_task(e) for e in self._episodes(number, tries)]
        try:
            done: list[T] = []
            for ended in asyncio.as_completed(tasks):
                done.append(await ended)
                if len(done) == self._size:
                    break
            self.cancelled += len(tasks) - len(done)
            return done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Publisher:
    """Writes and serves versions beside the learner, one after the other in the order offered.

    One is written while the one before is being loaded by the servers, and no more: a version that
    is due while another still waits for them is left out (`full`). So the learner waits for servers
    only where it has gone as far ahead of them as it may. What is served may thus be older than
    the newest that there was when the servers came free.

    Args:
      write: of a copy of the parameters and its version; what it made. All hosts write together.
      serve: of what was made and its version; None on a host that only writes.
    """

    def __init__(
        self,
        write: Callable[[Any, int], Coroutine[Any, Any, Any]],
        serve: Callable[[Any, int], Coroutine[Any, Any, None]] | None,
    ) -> None:
        self._write, self._serve = write, serve
        self._offered: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        self._made: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        self._waiting = 0  # offered and not yet with the servers
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def full(self) -> bool:
        """Whether one more would have to wait behind another."""
        return self._waiting > 0

    def offer(self, copied: Any, version: int) -> None:
        """Publish this beside what follows; raises what an earlier one raised."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._writer()), asyncio.create_task(self._server())]
        self._raise_failed()
        self._waiting += 1
        self._offered.put_nowait((copied, version))

    async def unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which waits for what is published; raises where that failed."""
        working = asyncio.create_task(work)
        try:
            await asyncio.wait({working, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failed()
            return working.result()
        finally:
            working.cancel()

    async def close(self) -> None:
        """End. What was offered is written to its end, for other hosts write it, too, but not
        served any more. Raises what failed, here too."""
        if self._tasks:
            writer, server = self._tasks
            server.cancel()
            written = asyncio.create_task(self._offered.join())
            await asyncio.wait({written, writer}, return_when=asyncio.FIRST_COMPLETED)
            for task in (written, writer):
                task.cancel()
            await asyncio.gather(written, writer, server, return_exceptions=True)
            self._raise_failed()

    async def abandon(self) -> None:
        """End at once; a thread that writes goes on by itself."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _raise_failed(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _writer(self) -> None:
        while True:
            copied, version = await self._offered.get()
            self._made.put_nowait((await self._write(copied, version), version))
            del copied  # its memory: the next may take a while to come
            self._offered.task_done()

    async def _server(self) -> None:
        while True:
            made, version = await self._made.get()
            self._waiting -= 1
            if self._serve is not None:
                await self._serve(made, version)
