"""Policies served by SGLang or sglang-jax: sessions over a fleet of servers, or over their router.

An episode's tokens are kept here, and a turn's are added to them only when its whole answer has
been checked. So an answer that is late, cut off, wrong, or of weights that it should not be of, is
thrown away whole, and the turn sampled again, here or on another server: no token is ever in an
episode twice, and none that was not checked.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.agent import Reply
from rl.fleet import Fleet
from rl.generate_api import BadReply, Generation, check_ids, sample_request
from rl.policy_server import ServerError
from rl.probe import Probe
from rl.replica import Refused, Replica, Unreachable
from rl.snapshot import Snapshot, version_of

if TYPE_CHECKING:
    import httpx2

_SHORT_S = 10.0


@dataclass(frozen=True)
class Sampling:
    """Attributes:
    stop_ids: end a turn. temperature: recorded log-probabilities are of the tempered distribution.
    lag: versions that a turn's tokens may be behind the newest published one.
    request_s: seconds for one turn; then it is aborted and sampled anew. attempts: of one turn.
    router: URL that turns are sent to instead of the servers themselves; "" for none.
    """

    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    lag: int = 0
    request_s: float = 300.0
    attempts: int = 8
    router: str = ""


class SGLangServer:
    """A `PolicyServer` over a fleet.

    Metrics: `server/tokens_per_s` (of one server, while it was busy), `server/idle` (share of the
    time without any request), `server/prefix_hits` (share of prompt tokens that were cached),
    `server/retries`, `server/discarded` (tokens), `server/serving`, `probe/mean`, `probe/max`.
    """

    def __init__(
        self,
        name: str,
        fleet: Fleet,
        http: httpx2.AsyncClient,
        vocab_size: int,
        sampling: Sampling,
    ) -> None:
        self.name, self.fleet, self._http = name, fleet, http
        self._vocab, self._sampling = vocab_size, sampling
        self._aborts: set[asyncio.Task[None]] = set()
        self._taken = time.monotonic()

    async def open(self, seed: int) -> SGLangSession:
        """A session; no server is bound before its first turn."""
        return SGLangSession(self, seed)

    async def publish(self, snapshot: Snapshot, probe: Probe | None) -> None:
        await self.fleet.publish(snapshot, probe)

    async def close(self) -> None:
        await asyncio.gather(*self._aborts, return_exceptions=True)
        await self.fleet.close()
        await self._http.aclose()

    def metrics(self) -> dict[str, float]:
        wall = max(time.monotonic() - self._taken, 1e-9)
        self._taken = time.monotonic()
        counts = [replica.take_counts() for replica in self.fleet.replicas]
        busy = sum(c.busy_s for c in counts)
        mean, largest = self.fleet.probe_error
        return {
            "server/tokens_per_s": sum(c.sampled for c in counts) / max(busy, 1e-9),
            "server/idle": max(0.0, 1.0 - busy / (wall * len(counts))),
            "server/prefix_hits": sum(c.cached for c in counts)
            / max(1, sum(c.prompt for c in counts)),
            "server/retries": float(sum(c.retries for c in counts)),
            "server/discarded": float(sum(c.discarded for c in counts)),
            "server/serving": float(len(self.fleet.serving())),
            "probe/mean": mean,
            "probe/max": largest,
        }

    async def sample(
        self, ids: Sequence[int], max_new: int, seed: int, session: SGLangSession
    ) -> Reply:
        """One checked turn behind `ids`, sampled anew until there is one.

        Raises ValueError for ids outside the vocabulary, before anything is sent, and ServerError
        when every attempt has failed.
        """
        check_ids(ids, self._vocab)
        wrong = ""
        for attempt in range(self._sampling.attempts):
            replica = await self._choose(session)
            rid = f"{session.key}.{uuid.uuid4().hex}"
            try:
                return await self._attempt(replica, ids, max_new, seed + attempt, rid)
            except Unreachable as error:
                wrong = str(error)
                replica.counts.retries += 1
                self._abort(replica, rid)  # it may still be running there
                await self.fleet.doubt(replica, wrong)
            except BadReply as error:
                wrong = f"{replica.url}: {error}"
                replica.counts.retries += 1
            except Refused as error:
                raise ServerError(str(error)) from None
            except asyncio.CancelledError:
                self._abort(replica, rid)
                raise
            await asyncio.sleep(min(0.05 * 2**attempt, 5.0))
        raise ServerError(f"{self._sampling.attempts} attempts at one turn failed, lately: {wrong}")

    async def _attempt(
        self, replica: Replica, ids: Sequence[int], max_new: int, seed: int, rid: str
    ) -> Reply:
        request = sample_request(
            ids,
            rid=rid,
            max_new=max_new,
            stop_ids=self._sampling.stop_ids,
            temperature=self._sampling.temperature,
            seed=seed,
        )
        sampling, fleet = self._sampling, self.fleet
        rejections = fleet.rejections
        # what its tokens are of, where a server says nothing of versions
        started_as = fleet.label if fleet.label in replica.verified else ""
        replica.begin()
        try:
            data = await replica.call(
                "/generate", request, timeout_s=sampling.request_s, url=sampling.router
            )
        finally:
            replica.end()
        found = fleet.engine.read(data, prompt=len(ids), max_new=max_new, vocab_size=self._vocab)
        try:
            versions = await self._versions(replica, found, started_as, rejections)
        except BadReply:
            replica.counts.discarded += len(found.ids)
            raise
        counts = replica.counts
        counts.requests += 1
        counts.sampled += len(found.ids)
        counts.prompt += len(ids)
        counts.cached += found.cached
        # a server also stops at other end tokens of the snapshot's generation config
        return Reply(found.ids, found.logprobs, found.ids[-1] in sampling.stop_ids, versions)

    async def _versions(
        self, replica: Replica, found: Generation, started_as: str, rejections: int
    ) -> list[int]:
        """The version of each token. Raises BadReply unless all are of weights that have been
        verified on the server that sampled them, and new enough."""
        routed = bool(self._sampling.router)
        await self.fleet.settled(None if routed else replica)
        among = self.fleet.replicas if routed else [replica]
        if routed and self.fleet.rejections != rejections:
            raise BadReply("a server was found with wrong weights meanwhile; it may be from that")
        newest = version_of(self.fleet.label)
        assert newest is not None
        versions: list[int] = []
        checked: dict[str | None, int] = {}
        for label in found.labels:
            if label not in checked:
                name = label or started_as
                version = version_of(name)
                if version is None or not any(name in r.verified for r in among):
                    await self._stale(replica, name)
                    raise BadReply(f"tokens of {name or 'no version'}, never verified there")
                if not newest - self._sampling.lag <= version <= newest:
                    await self._stale(replica, name)
                    raise BadReply(f"tokens of version {version}, the newest is {newest}")
                checked[label] = version
            versions.append(checked[label])
        return versions

    async def _stale(self, replica: Replica, label: str) -> None:
        """A server that answers with what it should not have is looked at before it goes on."""
        if self._sampling.router:
            for one in self.fleet.replicas:
                one.wake.set()
        elif replica.state == "serving" and label != self.fleet.label:
            await self.fleet.doubt(replica, f"{replica.url} answers as {label or 'no version'}")

    async def _choose(self, session: SGLangSession) -> Replica:
        """The server of this episode's earlier turns, which has their keys and values; the one
        with the fewest requests where there is none, or that one is out."""
        if self._sampling.router:  # it may give the turn to any: none may be in between
            await self.fleet.settled(None)
        serving = await self.fleet.some_serving()
        if session.replica not in serving:
            session.replica = min(serving, key=lambda r: (r.running, r.counts.requests))
        assert session.replica is not None
        return session.replica

    def _abort(self, replica: Replica, rid: str) -> None:
        """Tell the servers, without waiting, that nobody wants this answer any more."""
        where = self.fleet.replicas if self._sampling.router else [replica]
        for one in where:
            task = asyncio.create_task(_quietly_abort(one, rid))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)


class SGLangSession:
    """One episode: its tokens so far, and the server that has their keys and values."""

    def __init__(self, server: SGLangServer, seed: int) -> None:
        self.key = uuid.uuid4().hex
        self.replica: Replica | None = None
        self._server, self._seed, self._ids = server, seed, list[int]()

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        """Sample up to `max_new` tokens behind all that was said and `ids`."""
        prompt = [*self._ids, *ids]
        seed = (self._seed + len(prompt)) % 2**31
        reply = await self._server.sample(prompt, max_new, seed, self)
        self._ids = prompt + reply.ids
        return reply

    def close(self) -> None:
        pass  # a turn that is under way is aborted where it is cancelled


async def _quietly_abort(replica: Replica, rid: str) -> None:
    try:
        await replica.call("/abort_request", {"rid": rid}, timeout_s=_SHORT_S)
    except (Unreachable, Refused):
        pass
