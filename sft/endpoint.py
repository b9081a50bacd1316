"""A client of an OpenAI-compatible endpoint: one checked answer a call, however it misbehaves."""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from configs.errors import InputError
from sft.chat_api import Answer, BadAnswer, Declined, read_answer
from sft.spending import Budget, Prices, Spending

if TYPE_CHECKING:
    import httpx2

MAX_BODY = 8 << 20  # bytes of an answer
# how servers say that it is this conversation which they will not go on with
_DECLINED = (
    *(b"context_length", b"context length", b"context size", b"maximum context"),
    *(b"content_filter", b"content management"),
)
_RESERVED = ("model", "messages", "tools", "n", "stream", "seed", "temperature")


@dataclass(frozen=True)
class EndpointConfig:
    """Attributes:
    base_url: up to and with the version, e.g. https://api.example.com/v1.
    model: its name there.
    api_key_env: name of the environment variable that holds the key; "" sends none.
    temperature, max_tokens: of one turn; `limit_key` is what the endpoint calls the latter.
    extra: further fields of each request, e.g. {top_p: 0.95}.
    concurrency: episodes at one time.
    request_s: seconds for one answer, whole.
    attempts: for one turn, while the endpoint is busy, silent or gives nonsense; the pause between
      them starts at `pause_s` and doubles up to `longest_pause_s`, or is what Retry-After says.
    prices: US dollars for a million tokens. budget: limits over all starts of a run; 0: none.
    when_spent: stop, so that a higher budget goes on; or train on the episodes there are.
    """

    base_url: str = ""
    model: str = ""
    api_key_env: str = ""
    temperature: float = 1.0
    max_tokens: int = 2048
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    request_s: float = 180.0
    attempts: int = 8
    pause_s: float = 1.0
    longest_pause_s: float = 120.0
    prices: Prices = field(default_factory=Prices)
    budget: Budget = field(default_factory=Budget)
    when_spent: Literal["stop", "train"] = "stop"


class OutOfBudget(Exception):
    """The next request could cost more than is left."""


class _Again(Exception):
    """An attempt failed in a way that may pass. `pause`: seconds that the endpoint asked for;
    `paid`: it may have cost something."""

    def __init__(self, why: str, pause: float = 0.0, *, paid: bool = False) -> None:
        super().__init__(why)
        self.pause, self.paid = pause, paid


def check_endpoint(config: EndpointConfig) -> None:
    """Raises InputError for a config that cannot work, before anything is sent."""
    if "@" in config.base_url:  # what stands before it may be a password: not to be repeated
        raise InputError(
            "teach.endpoint.base_url: expected http(s)://HOST/v1, without a user or password; "
            "keys go into the variable that teach.endpoint.api_key_env names"
        )
    if not _usable(config.base_url):
        raise InputError(
            f"teach.endpoint.base_url: expected http(s)://HOST/v1, got {config.base_url!r}"
        )
    if not config.model:
        raise InputError("teach.endpoint.model is needed: the model's name at the endpoint")
    for name in ("max_tokens", "concurrency", "request_s", "attempts"):
        if getattr(config, name) <= 0:
            raise InputError(f"teach.endpoint.{name} must be above 0")
    values = (*vars(config.prices).values(), *vars(config.budget).values())
    if min(config.temperature, config.pause_s, config.longest_pause_s, *values) < 0:
        raise InputError(
            "teach.endpoint: temperature, pauses, prices and budget may not be below 0"
        )
    if config.budget.usd and not (config.prices.prompt or config.prices.completion):
        raise InputError("teach.endpoint.budget.usd needs teach.endpoint.prices")
    if taken := [key for key in config.extra if key in (*_RESERVED, config.limit_key)]:
        raise InputError(f"teach.endpoint.extra may not set {', '.join(taken)}")


def _usable(base_url: str) -> bool:
    import httpx2

    try:
        url = urlsplit(base_url)
        httpx2.URL(base_url)  # stricter than the former about what a host may be
        sound = url.port != 0 and bool(url.hostname)  # the former raises above 65535
    except (ValueError, httpx2.InvalidURL):
        return False
    whole = base_url.isprintable() and " " not in base_url
    known = url.scheme in ("http", "https")
    return known and sound and whole and not url.query and not url.fragment


def endpoint_key(config: EndpointConfig) -> str:
    """The key, or "" where none is to be sent. Raises InputError if it is not set, or none."""
    key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
    if config.api_key_env and not key:
        raise InputError(f"teach.endpoint.api_key_env: ${config.api_key_env} is not set")
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"teach.endpoint.api_key_env: ${config.api_key_env} holds what no header can: only "
            "printable ASCII may stand in a key"
        )
    return key


class Endpoint:
    """See the module's docstring. `spending` is asked before anything is sent."""

    def __init__(self, config: EndpointConfig, spending: Spending) -> None:
        import httpx2

        self.config, self.spending = config, spending
        local = urlsplit(config.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        self._http: httpx2.AsyncClient = httpx2.AsyncClient(
            timeout=None,  # an answer has one deadline, however slowly it drips in
            trust_env=not local,  # no proxy between us and loopback
            limits=httpx2.Limits(max_connections=None),
        )
        self._not_before = 0.0  # of any request: what a Retry-After holds up is all of them
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"

    @functools.cached_property
    def _key(self) -> str:
        """Read when something is sent: what is there already is read without."""
        return endpoint_key(self.config)

    async def close(self) -> None:
        await self._http.aclose()

    async def answer(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], seed: int
    ) -> Answer:
        """The next turn behind `messages`.

        Raises OutOfBudget; Declined, where it will not go on with this conversation; InputError,
        where it refuses us or every attempt has failed.
        """
        why, pause = "", self.config.pause_s
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        for attempt in range(self.config.attempts):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            body = json.dumps(self._request(messages, tools, seed + attempt), ensure_ascii=False)
            data = body.encode("utf-8", "replace")
            # no tokenizer of the endpoint's is known: source code has 3 to 4 bytes a token
            most = (len(data) // 2, self.config.max_tokens)
            key = self.spending.reserve(most)
            if key is None:
                raise OutOfBudget(self.spent())
            try:
                answer = await self._attempt(data, headers)
            except _Again as error:
                if not error.paid:
                    self.spending.settle(key, (0, 0))
                else:
                    self.spending.settle(key, most)
                why = str(error)
                wait = error.pause or pause * random.uniform(0.5, 1.0)
                if error.pause > self.config.longest_pause_s:
                    raise InputError(
                        f"{why}; it asks to wait {error.pause:.0f} s: same command later goes on"
                    ) from None
                if error.pause:
                    self._not_before = max(self._not_before, time.monotonic() + error.pause)
                if attempt + 1 < self.config.attempts:
                    await asyncio.sleep(wait)
                pause = min(2 * pause, self.config.longest_pause_s)
            except _Closed as closed:
                self.spending.settle(key, closed.tokens or (0, 0))
                raise closed.error from None
            else:
                self.spending.settle(key, answer.tokens or most)
                return answer
        raise InputError(
            f"{why}; gave up after {self.config.attempts} attempts: same command later goes on"
        )

    def spent(self) -> str:
        """The account in words."""
        budget, (prompt, completion) = self.config.budget, self.spending.tokens
        limits = [f"{budget.tokens} tokens"] if budget.tokens else []
        limits += [f"{budget.usd:g} USD"] if budget.usd else []
        return (
            f"the teacher has cost {prompt} prompt and {completion} completion tokens, "
            f"{self.spending.usd:.4f} USD, and one more turn could go beyond the budget of "
            f"{' and '.join(limits)}"
        )

    def _request(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], seed: int
    ) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "messages": list(messages),
            "tools": list(tools),
            "temperature": self.config.temperature,
            "seed": seed % 2**31,
            self.config.limit_key: self.config.max_tokens,
            **self.config.extra,
        }

    async def _attempt(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        import httpx2

        try:
            async with asyncio.timeout(self.config.request_s):
                async with self._http.stream(
                    "POST", self._url, content=body, headers=headers
                ) as answer:
                    status, after = answer.status_code, answer.headers.get("retry-after", "")
                    text = await _limited(answer)
        except TimeoutError:
            raise _Again(
                f"{self._url}: no answer within {self.config.request_s:g} s", paid=True
            ) from None
        except httpx2.ConnectError as error:
            raise _Again(self._safe(f"{self._url}: cannot connect: {error}")) from None
        except httpx2.HTTPError as error:
            why = self._safe(f"{self._url}: {type(error).__name__}: {error}")
            raise _Again(why, paid=True) from None
        if status != 200:
            raise self._refusal(status, text, after)
        try:
            return read_answer(json.loads(text))
        except (BadAnswer, ValueError, RecursionError) as error:
            what = str(error) if isinstance(error, BadAnswer) else "no JSON, or cut off"
            raise _Again(self._safe(f"{self._url}: {what}"), paid=True) from None
        except Declined as error:  # after it had begun to answer
            raise _Closed(error, (len(body) // 2, self.config.max_tokens)) from None

    def _refusal(self, status: int, text: bytes, after: str) -> Exception:
        """What an answer that is none means: again, later; not this conversation; or not us."""
        said = " ".join(text[:300].decode("utf-8", "replace").split())
        why = self._safe(f"{self._url}: HTTP {status}: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            # where it ran out of time the model may have answered
            return _Again(why, _seconds(after), paid=status in (408, 502, 504))
        declined = any(sign in text.lower() for sign in _DECLINED)
        if status in (400, 413, 422) and declined:
            return _Closed(Declined(why), None)
        return _Closed(InputError(why), None)

    def _safe(self, text: str) -> str:
        """Without the key, which some servers repeat."""
        return text.replace(self._key, "[key]") if self._key else text


class _Closed(Exception):
    """An attempt that no other one should follow, with what to raise and what it may have cost."""

    def __init__(self, error: Exception, tokens: tuple[int, int] | None) -> None:
        super().__init__(str(error))
        self.error, self.tokens = error, tokens


async def _limited(answer: Any) -> bytes:
    """The body, at most MAX_BODY of it. Raises _Again for more."""
    parts, size = [], 0
    async for part in answer.aiter_bytes():
        size += len(part)
        if size > MAX_BODY:
            raise _Again(f"{answer.url}: an answer of more than {MAX_BODY} bytes", paid=True)
        parts.append(part)
    return b"".join(parts)


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header, in either of its forms (RFC 9110, 10.2.3); 0 if there is none."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(retry_after).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, when - time.time())
