"""A run folder as one page: `report.html`, self-contained, to be opened from disk.

Reads `summary.json` (figures), `metrics.jsonl` (curves) and `trajectories/*.jsonl` (episodes); a
part that is not there yet is shown as not run. Agent text is hostile: it enters the page only as
JSON with every `<` escaped and leaves it only through `textContent`, under a content security
policy that admits the page's own script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from configs.errors import InputError
from configs.files import iter_jsonl, write_atomic
from rl import report_sections as sections
from sft.trajectory import ENVIRONMENT

MAX_EPISODES = 3000  # evaluation first, then an even choice from the rest

# what the viewer shows; token ids, authors and logprobs stay in the run folder
_LISTED = ("task", "package", "operator", "split", "policy", "seed")
_OPENED = ("turns", "patch", "verdict", "reward", "stop", "seconds", "weight_version")


@dataclass(frozen=True)
class Episode:
    """One trajectory record, less its token ids, and where it came from.

    Attributes:
      source: name of its file without `.jsonl`, e.g. "eval-rl".
      nth: how many episodes of the same task stand before it in that file.
      tokens, sampled: all tokens of the episode, and those that the policy wrote.
      tool_counts: calls by tool name.
    """

    source: str
    nth: int
    record: dict[str, Any]
    tokens: int
    sampled: int
    tool_counts: dict[str, int]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    Raises InputError if `run_dir` is not a folder or if one of its files is corrupt; the message
    names the file and the line.
    """
    if not run_dir.is_dir():
        raise InputError(f"no run folder at {run_dir}")
    summary = _summary(run_dir / "summary.json")
    metrics = run_dir / "metrics.jsonl"
    records = list(iter_jsonl(metrics)) if metrics.exists() else []
    episodes = [
        episode
        for path in sorted((run_dir / "trajectories").glob("*.jsonl"))
        for episode in _episodes(path)
    ]
    path = run_dir / "report.html"
    write_atomic(path, _page(run_dir.resolve().name, summary, records, episodes))
    return path


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(summary, dict):
        raise InputError(f"{path}: expected a JSON object")
    return summary


def _episodes(path: Path) -> Iterator[Episode]:
    seen: dict[str, int] = {}
    for number, record in enumerate(iter_jsonl(path), start=1):
        try:
            task = str(record["task"])
            counts: dict[str, int] = {}
            for turn in record["turns"]:
                for call in turn["calls"]:
                    counts[call["name"]] = counts.get(call["name"], 0) + 1
            episode = Episode(
                source=path.stem,
                nth=seen.get(task, 0),
                record={
                    **{key: record.get(key) for key in (*_LISTED, *_OPENED)},
                    "task": task,
                    "prompt": str(record.get("prompt", "")),
                },
                tokens=len(record.get("ids", ())),
                sampled=sum(a != ENVIRONMENT for a in record.get("author", ())),
                tool_counts=record.get("tool_counts", counts),
            )
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path}:{number}: not a trajectory record") from None
        seen[task] = episode.nth + 1
        yield episode


def _page(
    name: str, summary: dict[str, Any], metrics: list[dict[str, Any]], episodes: list[Episode]
) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    chosen = _choose(episodes)
    return Template(_asset("report.html")).substitute(
        policy=policy,
        name=escape(name),
        style=style,
        script=script,
        headline=sections.headline(summary),
        success=sections.success(summary),
        facts=sections.facts(summary),
        curves=sections.curves(metrics),
        tools=sections.tool_use(_by_source(episodes, "eval-sft"), _by_source(episodes, "eval-rl")),
        breakdown=sections.breakdown(summary),
        episodes=_data(chosen),
        count=sections.episode_count(len(chosen), len(episodes)),
    )


def _by_source(episodes: list[Episode], prefix: str) -> list[dict[str, int]]:
    return [episode.tool_counts for episode in episodes if episode.source.startswith(prefix)]


def _choose(episodes: list[Episode]) -> list[Episode]:
    """At most MAX_EPISODES: evaluations, last policy first, then an even choice of the others."""
    evaluated = [episode for episode in episodes if episode.source.startswith("eval")]
    rank = {policy: place for place, policy in enumerate(reversed(sections.POLICIES))}
    evaluated.sort(key=lambda episode: rank.get(str(episode.record["policy"]), len(rank)))
    others = [episode for episode in episodes if not episode.source.startswith("eval")]
    room = MAX_EPISODES - len(evaluated)
    if room <= 0:
        return evaluated[:MAX_EPISODES]
    if room < len(others):
        others = [others[index * len(others) // room] for index in range(room)]
    return evaluated + others


def _data(episodes: list[Episode]) -> str:
    """The page's data: a small index, the prompts once each, and one script element an episode.

    The browser keeps an element's text unparsed until the viewer opens that episode.
    """
    prompts: dict[str, int] = {}
    index, bodies = [], []
    for number, episode in enumerate(episodes):
        record = episode.record
        verdict = record["verdict"] if isinstance(record["verdict"], dict) else {}
        index.append(
            {
                **{key: record[key] for key in _LISTED},
                "source": episode.source,
                "nth": episode.nth,
                "outcome": verdict.get("verdict") or "none",
                "turns": len(record["turns"]),
                "prompt": prompts.setdefault(record["prompt"], len(prompts)),
            }
        )
        body = {key: record[key] for key in _OPENED}
        body |= {"tokens": episode.tokens, "sampled": episode.sampled}
        bodies.append(_embed(f"episode-{number}", body))
    return "\n".join([_embed("index", index), _embed("prompts", list(prompts)), *bodies])


def _embed(name: str, value: Any) -> str:
    """A JSON data block; no text in it can end it, nor open a comment."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode()
    return f'<script type="application/json" id="{name}">{text}</script>'


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asset(name: str) -> str:
    return resources.files("rl").joinpath("report_assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The hash by which a content security policy admits one inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
