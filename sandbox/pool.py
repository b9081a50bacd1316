"""Sandboxes on many Docker hosts: kept in stock, leased in turn, started anew where a host is well.

pool = DockerPool([DockerHost("ssh://vm1"), DockerHost("ssh://vm2")], size=64)
async with pool.lease(tree) as sandbox:
    ...
await pool.close()

Containers are started ahead, up to `size`, and reset between leases. A host that fails is put into
quarantine, asked again after a while that doubles, and rid of what was left there before it is used
again. What ran on it raises SandboxBroken: its episode can be run again, elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from sandbox.base import Limits, SandboxBroken, Tree
from sandbox.container import ContainerSlot
from sandbox.docker import ContainerConfig, DockerHost, Engine
from sandbox.leased import LeasedSandbox
from sandbox.member import Member
from sandbox.memo import TestMemo

TEND_S = 0.5
HEALTH_S = 5.0
PING_S = 5.0
FAILURES = 3  # starts that fail one after another before a host that answers is left alone
PATIENCE_S = 120.0  # where one waits and none has started
LEASE_TRIES = 5


class DockerPool:
    """Up to `size` sandboxes at a time over all `hosts`; `memo`, if given, answers test runs that
    were made before; `warn` is told of hosts that fail and of those that come back.

    Raises InputError at the first lease if no host answers at all, or starts what is asked of it.
    """

    def __init__(
        self,
        hosts: Sequence[DockerHost],
        size: int,
        limits: Limits | None = None,
        container: ContainerConfig | None = None,
        memo: TestMemo | None = None,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        if size < 1:
            raise InputError(f"a sandbox pool needs at least one slot, not {size}")
        hosts = list(hosts) or [DockerHost()]
        if len({host.address for host in hosts}) < len(hosts):
            raise InputError("sandbox.hosts: one host is there twice")
        self.size = size
        self.backend = "docker"
        self.limits = limits or Limits()
        self.memo = memo
        self._warn = warn
        label = uuid.uuid4().hex
        container = container or ContainerConfig()
        self.members = [Member(Engine(host, self.limits, container, label)) for host in hosts]
        self._idle: list[ContainerSlot] = []
        self._waiting: deque[asyncio.Future[ContainerSlot]] = deque()
        self._leased = 0
        self._closed = False
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._nudge = asyncio.Event()
        self._hope = 0.0  # when there last was a sandbox, or nobody waited for one
        self._counts: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._took: deque[float] = deque(maxlen=10_000)  # seconds from asked to leased
        self._waited: deque[float] = deque(maxlen=10_000)  # of those, in the queue

    async def __aenter__(self) -> DockerPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def environment(self) -> str:
        """Hash of what sandboxes find installed; "" before the first lease."""
        return next((m.engine.environment for m in self.members if m.engine.environment), "")

    def metrics(self) -> dict[str, Any]:
        """How the pool does: what there is now, and what happened so far."""
        return {
            "hosts_up": sum(member.up for member in self.members),
            "hosts": len(self.members),
            "slots": sum(len(member.slots) for member in self.members),
            "idle": len(self._idle),
            "leased": self._leased,
            "queue": len(self._waiting),
            "lease_ms": _percentiles(self._took),
            "queue_ms": _percentiles(self._waited),
            "failures": dict(self._causes),
            **{name: self._counts[name] for name in ("leases", "starts", "recoveries", "swept")},
        }

    @contextlib.asynccontextmanager
    async def lease(self, tree: Tree) -> AsyncIterator[LeasedSandbox]:
        """A sandbox that holds `tree`; first come, first served. Raises SandboxBroken when there is
        none to be had for long, and in the body when the host fails."""
        began = time.monotonic()
        for attempt in range(LEASE_TRIES):
            slot = await self._take(tree.root)
            self._leased += 1
            try:
                sandbox = LeasedSandbox(self, slot)
                waited = time.monotonic()
                try:
                    await sandbox.reset(tree)
                except SandboxBroken:
                    if attempt + 1 < LEASE_TRIES:
                        continue  # nothing was lost yet
                    raise
                self._waited.append(waited - began)
                self._took.append(time.monotonic() - began)
                self._counts["leases"] += 1
                try:
                    yield sandbox
                    return
                finally:
                    await sandbox.close()
            finally:
                self._leased -= 1
                self._give(slot)

    async def close(self) -> None:
        """Remove every container. Leases still held break."""
        self._closed = True
        for future in self._waiting:
            future.cancel()
        tasks = list(self._tasks) if self._loop is asyncio.get_running_loop() else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._idle.clear()
        for member in self.members:
            slots, member.slots = list(member.slots), set()
            await asyncio.gather(*(slot.stop() for slot in slots))
            with contextlib.suppress(SandboxBroken):  # the next who comes will sweep
                if member.up:
                    await asyncio.to_thread(member.engine.sweep, set)
            member.up = False
            member.engine.disconnect()

    # -- leases

    async def _take(self, root: Path) -> ContainerSlot:
        await self._open()
        if self._idle:
            # the one that holds this tree already, else the one that has idled longest
            same = [slot for slot in self._idle if slot.workspace.root == root]
            slot = (same or self._idle)[0]
            self._idle.remove(slot)
            return slot
        future: asyncio.Future[ContainerSlot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._nudge.set()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                self._give(future.result())
            raise

    def _give(self, slot: ContainerSlot) -> None:
        """Hand a slot to whoever waits longest, or put it into stock, or away if it is broken."""
        member = self._member(slot)
        if member is None:
            return  # closed meanwhile
        if slot.broken or not member.up:
            self._discard(member, slot)
            self._suspect(member, slot.broken or member.why)
            return
        if self._held() > self.size and member.held > self._share(member):
            self._discard(member, slot)  # a host that came back has taken over
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self._idle.append(slot)

    def _member(self, slot: ContainerSlot) -> Member | None:
        return next((m for m in self.members if slot in m.slots), None)

    def _discard(self, member: Member, slot: ContainerSlot) -> None:
        member.slots.discard(slot)
        self._spawn(slot.stop())
        self._nudge.set()

    # -- hosts

    async def _open(self) -> None:
        """Connect to every host, once, and begin to look after them."""
        if self._closed:
            raise RuntimeError("this sandbox pool has been closed")
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None:  # the streams of another loop are of no use in this one
            self._opening, self._nudge = asyncio.Lock(), asyncio.Event()
            for slot in [slot for member in self.members for slot in member.slots]:
                await slot.stop()
            self._idle, self._waiting, self._tasks = [], deque(), set()
            for member in self.members:
                member.slots, member.starting, member.up = set(), 0, False
            self._loop = None
        async with self._opening:
            if self._loop is loop:
                return
            await asyncio.gather(*map(self._connect, self.members))
            if not any(member.up for member in self.members):
                reasons = "; ".join(member.why for member in self.members)
                raise InputError(f"no Docker engine answers: {reasons}")
            self._loop = loop
            self._spawn(self._tend())

    async def _connect(self, member: Member) -> None:
        """Bring a host into use, rid of what nobody wants there; quarantine if it does not work."""
        try:
            await asyncio.to_thread(member.engine.connect)
            swept = await asyncio.to_thread(member.engine.sweep, member.containers)
        except SandboxBroken as error:
            self._out(member, str(error))
            return
        self._counts["swept"] += len(swept)
        member.answered()

    def _out(self, member: Member, why: str) -> None:
        if member.quarantine(why):
            self._warn(f"remend: Docker host out of use: {why}")

    def _suspect(self, member: Member, why: str) -> None:
        """Something failed there: find out whether the host does."""
        self._causes["host" if not member.up else "sandbox"] += 1
        if member.up:
            self._spawn(self._check(member, why))

    async def _check(self, member: Member, why: str) -> None:
        member.checked = time.monotonic()
        answers = False
        for _ in range(2):  # a busy machine may be late once
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_S):
                    answers = await asyncio.to_thread(member.engine.ping)
                break
        if member.up and (not answers or member.failures >= FAILURES):
            self._put_out(member, why or f"{member.engine.name}: no answer")

    def _put_out(self, member: Member, why: str) -> None:
        """Quarantine. Leases held there break now."""
        self._causes["quarantine"] += 1
        self._out(member, why)
        for slot in list(member.slots):
            slot.abandon(why)
            if slot in self._idle:
                self._idle.remove(slot)
                self._discard(member, slot)

    async def _tend(self) -> None:
        """Keep the stock full and the hosts known, until cancelled."""
        self._hope = time.monotonic()
        while True:
            self._fill()
            for member in self.members:
                if member.due():
                    member.postpone()  # not twice at a time
                    self._spawn(self._connect(member))
                elif member.up and time.monotonic() - member.checked > HEALTH_S:
                    member.checked = time.monotonic()
                    self._spawn(self._check(member, ""))
            self._mind_the_queue()
            self._nudge.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TEND_S):
                    await self._nudge.wait()

    def _mind_the_queue(self) -> None:
        """Tell those who wait in vain: at once if every host was tried and none ever started a
        sandbox, else when none has for long."""
        if any(member.slots for member in self.members) or not self._waiting:
            self._hope = time.monotonic()
        never = not self._counts["starts"] and all(m.outages and not m.up for m in self.members)
        if never or time.monotonic() - self._hope > PATIENCE_S:
            why = "; ".join(m.why or f"{m.engine.name}: nothing starts" for m in self.members)
            trouble = InputError if never else SandboxBroken
            while self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(trouble(f"no Docker host works: {why}"))

    def _held(self) -> int:
        return sum(member.held for member in self.members if member.up)

    def _share(self, member: Member) -> int:
        """How many of all slots a host should have, by what it can hold."""
        able = sum(other.engine.capacity for other in self.members if other.up)
        return self.size * member.engine.capacity // able if able else 0

    def _fill(self) -> None:
        """Start what is missing, on the hosts with most room, or with less than their share."""
        while True:
            able = [member for member in self.members if member.may_start()]
            if self._held() >= self.size:
                able = [member for member in able if member.held < self._share(member)]
            if not able:
                break
            member = min(able, key=lambda member: member.load)
            member.starting += 1
            self._spawn(self._start(member))
        for slot in list(self._idle):
            holder = self._member(slot)
            if self._held() > self.size and holder and holder.held > self._share(holder):
                self._idle.remove(slot)
                self._discard(holder, slot)

    async def _start(self, member: Member) -> None:
        slot = ContainerSlot(member.engine)
        try:
            await slot.start()
        except SandboxBroken as error:
            member.starting -= 1
            member.failures += 1
            self._suspect(member, str(error))
            return
        except BaseException:
            member.starting -= 1
            raise
        member.starting -= 1
        member.slots.add(slot)
        self._counts["starts"] += 1
        if member.started():
            self._counts["recoveries"] += 1
            self._warn(f"remend: Docker host in use again: {member.engine.name}")
        self._nudge.set()
        self._give(slot)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {"p50": round(statistics.median(ordered) * 1e3, 3), "p99": round(last * 1e3, 3)}
