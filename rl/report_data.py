"""The episodes as the page's data: a small index, and the rest in compressed chunks.

    index     JSON: one short entry an episode, what lists and filters need
    prompts   gzip, base64: every prompt once
    chunk-N   gzip, base64: what is shown of CHUNK episodes in the order of the index

The browser unpacks a chunk when the viewer opens one of its episodes. What agents wrote is thereby
never text of the page; the index, which is, has every `<` escaped.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from typing import Any

from rl.episodes import LISTED, OPENED, Episode

CHUNK = 32  # episodes unpacked at a time: a few milliseconds, and enough for gzip to find repeats


def embedded(episodes: Sequence[Episode]) -> str:
    """The data elements for the page's script."""
    prompts: dict[str, int] = {}
    index: list[dict[str, Any]] = []
    bodies: list[dict[str, Any]] = []
    for episode in episodes:
        record = episode.record
        entry = {
            **{key: record[key] for key in LISTED},
            "source": episode.source,
            "nth": episode.nth,
            "outcome": episode.outcome,
            "turns": len(record["turns"]),
            "tools": sorted(episode.tool_counts),
            "flags": episode.flags,
            "prompt": prompts.setdefault(record["prompt"], len(prompts)),
        }
        index.append({"run": episode.run, **entry} if episode.run else entry)
        body = {key: record[key] for key in OPENED}
        bodies.append(body | {"tokens": episode.tokens, "sampled": episode.sampled})
    chunks = [bodies[start : start + CHUNK] for start in range(0, len(bodies), CHUNK)]
    packed = [("prompts", list(prompts)), *((f"chunk-{n}", part) for n, part in enumerate(chunks))]
    return "\n".join(
        [
            _element("index", "application/json", _json(index).replace("<", "\\u003c")),
            *(_element(name, "application/gzip", _packed(value)) for name, value in packed),
        ]
    )


def _element(name: str, kind: str, text: str) -> str:
    """A data block: `text` has no `<`, so nothing in it can end the block or open a comment."""
    return f'<script type="{kind}" id="{name}">{text}</script>'


def _json(value: Any) -> str:
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()


def _packed(value: Any) -> str:
    # without a time stamp: the same run gives the same page
    return base64.b64encode(gzip.compress(_json(value).encode(), 6, mtime=0)).decode()


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
