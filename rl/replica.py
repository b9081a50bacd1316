"""One server of a fleet: its address, what is known of it, and calls that fail in known ways."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rl.launch import Launcher

if TYPE_CHECKING:
    import httpx2

# serving: verified; busy: being updated or verified, gets no new work; out: not to be used
State = Literal["serving", "busy", "out"]


class Unreachable(Exception):
    """No usable answer: refused, cut off, too late, or the server's own failure (5xx). The same
    request may succeed elsewhere or later."""


class Refused(Exception):
    """The server understood, and will not (4xx): asking again is of no use."""


@dataclass
class Counts:
    """Since they were last taken. Tokens, requests, and seconds in which any request ran."""

    sampled: int = 0
    prompt: int = 0
    cached: int = 0
    requests: int = 0
    retries: int = 0
    discarded: int = 0
    busy_s: float = 0.0


class Replica:
    """See the module's docstring.

    Attributes:
      verified: labels whose weights it was seen to have, by version and by probe.
      trouble: why it is out; "" if it never was.
    """

    def __init__(self, url: str, http: httpx2.AsyncClient, launcher: Launcher | None) -> None:
        self.url, self.launcher, self._http = url.rstrip("/"), launcher, http
        self.state: State = "out"
        self.verified: set[str] = set()
        self.trouble = "not started yet"
        self.counts = Counts()
        self.running = self.failed_starts = 0
        self.lock = asyncio.Lock()  # held while it is updated or verified
        self.wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._since = 0.0

    async def call(self, path: str, body: Any = None, *, timeout_s: float, url: str = "") -> Any:
        """POST `body` as JSON, or GET; the decoded answer, None if it is empty.

        Raises Unreachable or Refused, both naming the server and what it said.
        """
        import httpx2

        at = f"{url or self.url}{path}"
        headers = {"x-smg-routing-key": body["rid"].partition(".")[0]} if _routed(body) else None
        try:
            async with asyncio.timeout(timeout_s):
                if body is None:
                    answer = await self._http.get(at)
                else:
                    answer = await self._http.post(at, json=body, headers=headers)
            if answer.status_code >= 500 or answer.status_code in (408, 429):
                raise Unreachable(f"{at}: HTTP {answer.status_code}: {answer.text[:200]}")
            if answer.status_code >= 400:
                raise Refused(f"{at}: HTTP {answer.status_code}: {answer.text[:300]}")
            return answer.json() if answer.content else None
        except TimeoutError:
            raise Unreachable(f"{at}: no answer within {timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise Unreachable(f"{at}: {type(error).__name__}: {error}") from None
        except ValueError:
            raise Unreachable(f"{at}: the answer is not JSON, or was cut off") from None

    def begin(self) -> None:
        """Count one more running request."""
        if self.running == 0:
            self._since = time.monotonic()
            self._idle.clear()
        self.running += 1

    def end(self) -> None:
        """Count one less."""
        self.running -= 1
        if self.running == 0:
            self.counts.busy_s += time.monotonic() - self._since
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing runs here; False if that took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def put_out(self, why: str, *, forget: bool = False) -> None:
        """Give it no more work until it has been verified again. `forget`: it is, or may be,
        another process than before."""
        self.trouble = why
        if forget:
            self.verified.clear()
        if self.state == "serving":
            self.state = "out"
        self.wake.set()

    def take_counts(self) -> Counts:
        """The counts since the last call."""
        taken, self.counts = self.counts, Counts()
        if self.running:
            now = time.monotonic()
            taken.busy_s += now - self._since
            self._since = now
        return taken


def _routed(body: Any) -> bool:
    """Whether a request carries its session, by which a router keeps an episode on one server."""
    return isinstance(body, dict) and "input_ids" in body and "rid" in body
