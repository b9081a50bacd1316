"""The in-process policy server: one decode engine shared by many concurrent episodes.

Each session owns a slot of the engine for as long as its episode lives, so its KV prefix stays in
place between turns and only new tokens are ever computed. Everything runs on the event loop's
thread: the engine advances one step at a time and yields in between, so that tools can answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from model.decode import Engine, Result
from model.hf import load_hf
from rl.agent import Reply
from rl.probe import Probe
from rl.snapshot import Snapshot

# A decode step costs nearly the same for one episode as for all, and on a CPU it takes their tools'
# time: on two cores, with 1.7 episodes to a step, rollouts took a third longer than with 4.5.
GATHER_S = 0.05


class InProcessServer:
    """A policy behind `Engine`.

    Args:
      name: who the trajectories say wrote them, e.g. "sft" or "rl".
      stop_ids: token ids that end a turn.
      temperature: of sampling; recorded log-probabilities are of the tempered distribution.
    """

    def __init__(
        self, engine: Engine, name: str, stop_ids: tuple[int, ...], temperature: float = 1.0
    ) -> None:
        self.name = name
        self._engine, self._stop_ids, self._temperature = engine, stop_ids, temperature
        self._free = asyncio.Semaphore(engine.slots)
        self._waiting: dict[int, asyncio.Future[Result]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._open = 0  # sessions
        self._came = asyncio.Event()  # another one waits for tokens, or is gone

    async def open(self, seed: int) -> ServerSession:
        """A session in a free slot; waits for one."""
        await self._free.acquire()
        self._open += 1
        return ServerSession(self, self._engine.open(), seed)

    async def publish(self, snapshot: Snapshot, probe: Probe | None) -> None:
        """Use the snapshot's weights from the next token on. They are read from the very folder,
        checked against its manifest, so that there is nothing for a probe to find."""
        self._engine.set_params(load_hf(snapshot.folder).params, snapshot.version)

    def metrics(self) -> dict[str, float]:
        """None: what the engine does is measured by `remend bench`."""
        return {}

    async def close(self) -> None:
        pass

    async def _generate(self, slot: int, ids: Sequence[int], max_new: int, seed: int) -> Result:
        self._engine.extend(slot, list(ids))
        self._engine.sample(
            slot,
            max_new=max_new,
            stop_ids=self._stop_ids,
            temperature=self._temperature,
            seed=seed,
        )
        self._came.set()
        self._waiting[slot] = future = asyncio.get_running_loop().create_future()
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        """Step the engine while any session waits for tokens."""
        try:
            while self._waiting:
                await self._gather()
                for result in self._engine.step():
                    self._waiting.pop(result.slot).set_result(result)
                await asyncio.sleep(0)
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()

    async def _gather(self) -> None:
        """Wait a moment for the episodes that are at their tools."""
        end = time.monotonic() + GATHER_S
        while len(self._waiting) < self._open and (left := end - time.monotonic()) > 0:
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    def _release(self, slot: int) -> None:
        self._waiting.pop(slot, None)
        self._engine.close(slot)
        self._open -= 1
        self._came.set()
        self._free.release()


class ServerSession:
    """One episode's hold on a slot."""

    def __init__(self, server: InProcessServer, slot: int, seed: int) -> None:
        self._server, self._slot, self._seed = server, slot, seed

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        """Prefill `ids` behind what the slot holds, then sample up to `max_new` tokens."""
        result = await self._server._generate(self._slot, ids, max_new, self._seed)
        return Reply(
            ids=result.ids,
            logprobs=result.logprobs,
            ended=result.finish == "stop",
            versions=result.versions,
        )

    def close(self) -> None:
        """Give the slot back."""
        self._server._release(self._slot)
