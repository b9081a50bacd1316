"""Servers that all serve the newest snapshot: published to, verified, watched, caught up.

A server is used only after its weights were verified: it says the snapshot's label, and its
log-probabilities of the probe are the learner's. Whatever goes wrong with it puts it out; whoever
minds it brings it to the newest snapshot, verifies it, and only then is it used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.config import Qwen3Config
from rl.engines import Engine
from rl.generate_api import BadReply, read_scores, score_request
from rl.policy_server import ServerError
from rl.probe import Probe
from rl.replica import Refused, Replica, Unreachable
from rl.snapshot import Snapshot, validate

_STARTS = 3  # failed ones in a row, before a server is given up


@dataclass(frozen=True)
class Patience:
    """Seconds, and the difference between log-probabilities that still counts as equal.

    Attributes:
      health_s: between looks at a server that serves. retry_s: at first, between tries to bring
        back one that does not; doubles up to 30.
      call_s: for one probe. start_s: until some server serves a new snapshot, its start included.
      tolerance: mean over the probe's tokens, in nats.
    """

    health_s: float = 5.0
    retry_s: float = 0.5
    call_s: float = 60.0
    start_s: float = 900.0
    tolerance: float = 1e-3


class Mismatch(Exception):
    """A server that has other weights than it says."""


class Fleet:
    """See the module's docstring. `check` is called in a thread before anything is published."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        engine: Engine,
        config: Qwen3Config,
        patience: Patience,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.replicas, self.engine = list(replicas), engine
        self._config, self._patience, self._say = config, patience, say
        self._target: tuple[Snapshot, Probe | None] | None = None
        self._changed = asyncio.Condition()  # some replica's state
        self._minders: list[asyncio.Task[None]] = []
        self._one = asyncio.Lock()  # taken by updates that must not happen to two at a time
        self.rejections = 0  # servers found with wrong weights so far
        self.probe_error = (0.0, 0.0)  # mean and largest difference, worst of the last snapshot

    @property
    def label(self) -> str:
        """Of the newest snapshot; "" before the first."""
        return self._target[0].label if self._target else ""

    def serving(self) -> list[Replica]:
        """The servers that may be used."""
        return [replica for replica in self.replicas if replica.state == "serving"]

    async def publish(self, snapshot: Snapshot, probe: Probe | None) -> None:
        """Bring every server to `snapshot`; returns when all that served before serve it or are
        out, and at least one does.

        Raises:
          InputError: the snapshot is not whole, or not of this model; no server was told of it.
          ServerError: no server serves it in time.
        """
        await asyncio.to_thread(validate, snapshot, self._config)
        self._target = snapshot, probe
        self.probe_error = (0.0, 0.0)
        if not self._minders:
            self._minders = [asyncio.create_task(self._mind(r)) for r in self.replicas]
        served = self.serving()
        await asyncio.gather(*(self._bring(replica) for replica in served))
        for replica in self.replicas:
            replica.wake.set()
        await self.some_serving(lambda r: snapshot.label in r.verified)

    async def some_serving(self, fits: Callable[[Replica], bool] = lambda _: True) -> list[Replica]:
        """The servers that may be used and fit; waits for one. Raises ServerError in the end."""
        try:
            async with asyncio.timeout(self._patience.start_s), self._changed:
                while not (found := [r for r in self.serving() if fits(r)]):
                    self._fail_if_hopeless()
                    await self._changed.wait()
                return found
        except TimeoutError:
            troubles = "; ".join(r.trouble for r in self.replicas)
            raise ServerError(
                f"no policy server within {self._patience.start_s:g} s: {troubles}"
            ) from None

    async def settled(self, replica: Replica | None) -> None:
        """Wait until no update or verification of it, or of any, is under way."""
        for one in [replica] if replica else self.replicas:
            async with one.lock:
                pass

    async def doubt(self, replica: Replica, why: str, *, forget: bool = False) -> None:
        """Put a server out until it has been verified again."""
        self._say(f"{replica.url} is out: {why}")
        replica.put_out(why, forget=forget)
        await self._tell()

    async def close(self) -> None:
        """End the minders, and the servers that were started here."""
        for task in self._minders:
            task.cancel()
        await asyncio.gather(*self._minders, return_exceptions=True)
        launchers = [r.launcher for r in self.replicas if r.launcher is not None]
        await asyncio.gather(*(launcher.stop() for launcher in launchers))

    def _fail_if_hopeless(self) -> None:
        """Raise what ended the minders of all servers: their own errors are not worth a retry."""
        ended = [task for task in self._minders if task.done() and not task.cancelled()]
        if self._minders and len(ended) == len(self._minders):
            error = ended[0].exception()
            raise error if error else ServerError("the policy servers are closed")

    async def _mind(self, replica: Replica) -> None:
        """Keep one server serving the newest snapshot, as long as the fleet is there."""
        wait = self._patience.retry_s
        try:
            while True:
                assert self._target is not None
                if replica.state == "serving" and self.label in replica.verified:
                    wait = self._patience.retry_s
                    await self._look(replica)
                elif await self._bring(replica):
                    continue
                pause = self._patience.health_s if replica.state == "serving" else wait
                wait = min(2 * wait, 30.0)
                replica.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await replica.wake.wait()
        finally:
            if replica.state == "serving":
                replica.state = "out"
            await asyncio.shield(self._tell())

    async def _look(self, replica: Replica) -> None:
        """See that a server is still there, and still the one that was verified."""
        label = self.label
        try:
            found = await self.engine.label(replica)
        except (Unreachable, Refused) as error:
            await self.doubt(replica, str(error), forget=True)
            return
        if found != label and label == self.label and not replica.lock.locked():
            await self.doubt(replica, f"{replica.url} has {found}, not {label}", forget=True)

    async def _bring(self, replica: Replica) -> bool:
        """Bring one server to the newest snapshot and verify it; whether that was done."""
        async with contextlib.AsyncExitStack() as stack:
            if self.engine.one_by_one:
                await stack.enter_async_context(self._one)
            await stack.enter_async_context(replica.lock)
            assert self._target is not None
            snapshot, probe = self._target
            if replica.state == "serving" and snapshot.label in replica.verified:
                return True
            replica.state = "busy"
            done = False
            try:
                await self._advance(replica, snapshot, probe)
                done = True
            except (Unreachable, Refused, Mismatch, BadReply, ValueError) as error:
                replica.trouble = str(error)
            finally:
                replica.state = "serving" if done else "out"
        if not done:
            self._say(f"{replica.url} is out: {replica.trouble}")
        await self._tell()
        return done

    async def _advance(self, replica: Replica, snapshot: Snapshot, probe: Probe | None) -> None:
        launcher = replica.launcher
        if launcher is not None and not launcher.alive():
            replica.verified.clear()
            await launcher.restart(snapshot)
            await self._await_start(replica)
        if await self.engine.label(replica) == snapshot.label:
            with contextlib.suppress(Mismatch, BadReply, ValueError):
                await self._verify(replica, snapshot, probe)
                return
        await self.engine.update(replica, snapshot)
        if self.engine.one_by_one:
            await self._await_start(replica)
        await self._verify(replica, snapshot, probe)

    async def _verify(self, replica: Replica, snapshot: Snapshot, probe: Probe | None) -> None:
        found = await self.engine.label(replica)
        if found != snapshot.label:
            raise Mismatch(f"{replica.url} says it has {found} after an update to {snapshot.label}")
        if probe is not None:
            request = score_request(probe.ids)
            answer = await replica.call("/generate", request, timeout_s=self._patience.call_s)
            try:
                mean, largest = probe.compare(read_scores(answer, probe.ids))
                if mean > self._patience.tolerance:
                    raise Mismatch(
                        f"{replica.url} says it has {snapshot.label}, but its log-probabilities "
                        f"are not the learner's: off by {mean:.2g} (mean), {largest:.2g} (max)"
                    )
            except (Mismatch, BadReply, ValueError):
                self.rejections += 1
                replica.verified.clear()
                await self.engine.disown(replica)
                raise
            worst = self.probe_error
            self.probe_error = max(worst[0], mean), max(worst[1], largest)
        replica.verified.add(snapshot.label)

    async def _await_start(self, replica: Replica) -> None:
        """Wait until a server that was just started answers. Raises Unreachable if it ended, and
        ServerError if it did so again and again."""
        launcher, began = replica.launcher, time.monotonic()
        while True:
            try:
                await self.engine.label(replica)
                replica.failed_starts = 0
                return
            except (Unreachable, Refused) as error:
                ended = launcher is not None and not launcher.alive()
                if not ended and time.monotonic() - began < self._patience.start_s:
                    await asyncio.sleep(self._patience.retry_s)
                    continue
                replica.failed_starts += 1
                message = f"{replica.url}: a server that was started did not come up"
                if replica.failed_starts < _STARTS:
                    raise Unreachable(message) from error
                raise ServerError(f"{message}, {_STARTS} times: see the logs in server/") from error

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
