"""Which rows of a KV cache hold the same tokens, so that siblings compute them once.

The episodes of a group start from one prompt and often read the same file next. What a row holds is
named by a key: a digest of every call that filled it, so that equal keys mean equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np


def key_of(before: bytes, version: int, sampled: Sequence[int], given: Sequence[int]) -> bytes:
    """The key of what had ``before``, then the ids and versions in ``sampled``, then ``given``."""
    numbers = np.asarray([version, len(sampled), *sampled, *given], np.int64)
    return blake2b(before + numbers.tobytes(), digest_size=16).digest()


@dataclass
class Fill:
    """Tokens on their way into a row; ``followers`` are rows that will take a copy."""

    row: int
    start: int
    tokens: Sequence[int]
    followers: list[int] = field(default_factory=list)


class Prefixes:
    """Host-side account of complete and pending fills."""

    def __init__(self, rows: int) -> None:
        self._rows: dict[bytes, list[int]] = {}
        self._keys: list[list[bytes]] = [[] for _ in range(rows)]
        self._fills: dict[bytes, Fill] = {}

    def holder(self, key: bytes) -> int | None:
        """A row that holds it whole."""
        return self._rows[key][0] if key in self._rows else None

    def hold(self, row: int, key: bytes) -> None:
        """``row`` holds it from now on."""
        self._rows.setdefault(key, []).append(row)
        self._keys[row].append(key)

    def forget(self, row: int) -> None:
        """``row`` will be written over from its start."""
        for key in self._keys[row]:
            self._rows[key].remove(row)
            if not self._rows[key]:
                del self._rows[key]
        self._keys[row].clear()

    def begin(self, key: bytes, fill: Fill) -> None:
        """``fill`` is queued."""
        self._fills[key] = fill

    def follow(self, key: bytes, row: int) -> bool:
        """``row`` takes a copy at the end of the fill that brings this, if one is under way."""
        fill = self._fills.get(key)
        if fill is None:
            return False
        fill.followers.append(row)
        return True

    def unfollow(self, row: int) -> Fill | None:
        """``row`` waits for nobody; the fill it waited for, to be its own."""
        for fill in self._fills.values():
            if row in fill.followers:
                fill.followers.remove(row)
                return Fill(row, fill.start, fill.tokens)
        return None

    def end(self, key: bytes) -> Fill:
        """A fill is in its row now, and about to be in its followers'."""
        fill = self._fills.pop(key)
        for row in (fill.row, *fill.followers):
            self.hold(row, key)
        return fill

    def leave(self, row: int) -> list[tuple[bytes, Fill]]:
        """``row`` neither waits nor is filled any longer. Fills that must be queued anew, for a
        row that had followed this one."""
        self.unfollow(row)
        orphans = []
        for key, fill in list(self._fills.items()):
            if fill.row != row:
                continue
            if not fill.followers:
                del self._fills[key]
                continue
            fill.row = fill.followers.pop(0)
            orphans.append((key, fill))
        return orphans
