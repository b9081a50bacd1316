"""What a run folder says of its run: figures, curves, episodes and configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import iter_jsonl
from rl.episodes import Episode, by_policy, read_episodes
from rl.evaluate import breakdown, paired_gain, per_task, success
from rl.report_sections import Series, series
from sandbox.agreement import agreement


@dataclass(frozen=True)
class Run:
    """A run folder, read. `summary` is `summary.json`; what it lacks and the evaluated episodes
    can tell is computed from them. `config` is the text of `config.yaml`, empty if there is none.
    """

    folder: Path
    name: str
    summary: dict[str, Any]
    curves: dict[str, Series]
    episodes: list[Episode]
    config: str


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a run folder; its episodes carry `label` as their run, where a page shows several.

    Raises InputError if `folder` is not a folder or if one of its files is corrupt; the message
    names the file and the line.
    """
    if not folder.is_dir():
        raise InputError(f"no run folder at {folder}")
    summary = _summary(folder / "summary.json")
    metrics = folder / "metrics.jsonl"
    records = list(iter_jsonl(metrics)) if metrics.exists() else []
    episodes = read_episodes(folder, label or "")
    config = folder / "config.yaml"
    return Run(
        folder,
        label or folder.resolve().name,
        _computed(episodes) | summary,
        series(records),
        episodes,
        config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
    )


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


def _computed(episodes: list[Episode]) -> dict[str, Any]:
    """Success, gain and breakdowns of the evaluations that are whole."""
    policies = by_policy(episodes)
    if not policies:
        return {}
    found: dict[str, Any] = {
        "success": {policy: success(done) for policy, done in policies.items()},
        "per_operator": breakdown(policies, "operator"),
        "per_package": breakdown(policies, "package"),
    }
    places = sorted({episode.environment for done in policies.values() for episode in done})
    found["environment"] = ", ".join(places)
    if any(len(episode.verdicts) > 1 for done in policies.values() for episode in done):
        found["agreement"] = {
            policy: agreement(episode.verdicts for episode in done)
            for policy, done in policies.items()
        }
    before, after = (per_task(policies.get(policy, [])) for policy in ("sft", "rl"))
    if before and before.keys() == after.keys():
        found["gain"] = paired_gain(before, after)
    return found
