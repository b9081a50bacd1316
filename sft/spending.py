"""What an endpoint has cost so far, kept so that no kill forgets it, and the limits on it."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import append_jsonl, read_jsonl
from model.hosts import host_count, host_index

_MILLION = 1e6
Tokens = tuple[int, int]  # (prompt, completion)


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, tokens: Tokens) -> float:
        """Dollars."""
        return (tokens[0] * self.prompt + tokens[1] * self.completion) / _MILLION


@dataclass(frozen=True)
class Budget:
    """Limits of a run, over all its starts; 0: none."""

    tokens: int = 0
    usd: float = 0.0


class Spending:
    """The account of a run folder, in `spent.jsonl`.

    The most that a request can cost is written down before it is sent, and what it did cost when
    its answer is there. A request whose answer never came, because it or this process was cut off,
    counts in full: it may have been paid for. On several hosts each has a file, and an even part of
    what was left when they started.
    """

    def __init__(self, run: Path, prices: Prices, budget: Budget) -> None:
        self._prices, self._budget = prices, budget
        several = host_count() > 1
        self._path = run / (f"spent.host-{host_index()}.jsonl" if several else "spent.jsonl")
        self._before = [0, 0]
        self.requests = 0
        for path in sorted(run.glob("spent*.jsonl")):
            for tokens in _account(read_jsonl(path)):
                self.requests += 1
                self._before = [a + b for a, b in zip(self._before, tokens, strict=True)]
        self._open: dict[str, Tokens] = {}
        self._closed = [0, 0]

    @property
    def tokens(self) -> Tokens:
        """Prompt and completion tokens so far, those of requests under way at their most."""
        parts: list[Iterable[int]] = [self._before, self._closed, *self._open.values()]
        prompt, completion = (sum(column) for column in zip(*parts, strict=True))
        return prompt, completion

    @property
    def usd(self) -> float:
        return self._prices.of(self.tokens)

    def reserve(self, most: Tokens) -> str | None:
        """Set `most` aside; the key to `settle` it with; None where that is more than is left."""
        before = self._before[0], self._before[1]
        prompt, completion = (now - then for now, then in zip(self.tokens, before, strict=True))
        own = prompt + most[0], completion + most[1]
        left_tokens = (self._budget.tokens or math.inf) - sum(before)
        left_usd = (self._budget.usd or math.inf) - self._prices.of(before)
        hosts = host_count()
        if sum(own) > left_tokens / hosts or self._prices.of(own) > left_usd / hosts:
            return None
        key = uuid.uuid4().hex
        append_jsonl(self._path, {"request": key, "at_most": list(most)})
        self._open[key] = most
        self.requests += 1
        return key

    def settle(self, key: str, spent: Tokens) -> None:
        """What a request did cost."""
        append_jsonl(self._path, {"request": key, "spent": list(spent)})
        del self._open[key]
        self._closed = [a + b for a, b in zip(self._closed, spent, strict=True)]


def _account(records: Iterable[dict[str, Any]]) -> Iterable[list[int]]:
    """(prompt, completion) of each request: what it cost, or else the most that it could."""
    found: dict[str, Any] = {}
    for record in records:
        found[record["request"]] = record.get("spent", record.get("at_most"))
    return found.values()
