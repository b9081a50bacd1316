"""A run folder, or two beside each other, as one page: self-contained, to be opened from disk.

Reads `summary.json` (figures), `metrics.jsonl` (curves) and `trajectories/*.jsonl` (episodes); a
part that is not there yet is shown as not run. Agent text is hostile: it enters the page only as
data (see report_data.py) and leaves it only through `textContent`, under a content security policy
that admits the page's own script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from configs.errors import InputError
from configs.files import write_atomic
from rl import report_compare as comparison
from rl import report_sections as sections
from rl.episodes import POLICIES, Episode, by_policy, choose, tool_use
from rl.figures import Dot, Dots, Figure, lines_of
from rl.report_data import embedded
from rl.run_folder import Run, read_run

MAX_EPISODES = 10_000  # on a page: evaluation first, then an even choice from the rest
SCRIPTS = ("page.js", "curves.js", "list.js", "episode.js", "beside.js", "keys.js")


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path. Raises InputError as `read_run` does."""
    run = read_run(folder)
    use, counts = _tool_use(run)
    parts = [
        section("Held-out success", sections.success(run.summary) + sections.facts(run.summary)),
        section("Learning curves", sections.curves(run.curves)),
        section("Tool use before and after RL", sections.tool_use(use, counts)),
        section("Held-out success by kind of task", sections.breakdown(run.summary)),
    ]
    if table := sections.agreement(run.summary):
        parts.insert(1, section("Verdicts of both environments on the same diffs", table))
    path = folder / "report.html"
    write_atomic(path, _of_runs(run.name, sections.headline(run.summary), parts, [run]))
    return path


def write_comparison(first: Path, second: Path, out: Path | None = None) -> tuple[Path, dict]:
    """Write a page on two runs beside each other; its path and the paired differences by policy.

    `out`: by default `first/compare-NAME.html`, with the name of the second run. Raises InputError
    as `read_run` does, and if both are the same folder.
    """
    if first.resolve() == second.resolve():
        raise InputError(f"{first} and {second} are the same run: a comparison needs two")
    names = comparison.names(first, second)
    runs = [read_run(folder, name) for folder, name in zip((first, second), names, strict=True)]
    found = comparison.differences(*runs)
    parts = [
        section("Held-out success, task by task", comparison.success(names, found)),
        section("Gain of RL in each run", comparison.gains(runs)),
        section("Learning curves", sections.curves(comparison.curves(runs), names)),
        section("Tool use in held-out episodes", comparison.tools(runs)),
        section("How the runs were made", comparison.made(runs)),
    ]
    path = out or first / f"compare-{second.resolve().name}.html"
    write_atomic(path, _of_runs(" · ".join(names), comparison.headline(names, found), parts, runs))
    return path, found


def figures_of(folder: Path) -> list[Figure]:
    """Every figure of a run's page that has data. Raises InputError as `read_run` does."""
    run = read_run(folder)
    rows = []
    for policy, label in POLICIES.items():
        mean, low, high = (
            sections.number(run.summary, "success", policy, key) for key in ("mean", "low", "high")
        )
        if mean is not None:
            rows.append((label, [Dot(policy, label, mean, low, high)]))
    found: list[Figure] = [Dots("Held-out success", "share of tasks", rows, 1.0)] if rows else []
    for key, kind in (("per_operator", "operator"), ("per_package", "package")):
        table = run.summary.get(key)
        if isinstance(table, dict) and table:
            parts = [(name, _dots(table[name])) for name in sorted(table)]
            found.append(Dots(f"Held-out success by {kind}", "share of episodes", parts, 1.0))
    use, _ = _tool_use(run)
    if use:
        parts = [(tool, _dots(row)) for tool, row in use.items()]
        found.append(Dots("Tool use before and after RL", "calls an episode", parts))
    return found + lines_of(run.curves)


def _dots(row: object) -> list[Dot]:
    values = ((policy, sections.rate(row, policy)) for policy in POLICIES)
    return [Dot(p, POLICIES[p], value) for p, value in values if value is not None]


def _tool_use(run: Run) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Calls an episode by tool and policy, before and after RL, and the episodes counted."""
    policies = by_policy(run.episodes)
    sides = {policy: done for policy, done in policies.items() if policy in ("sft", "rl")}
    return tool_use(sides), {policy: len(done) for policy, done in sides.items()}


def section(title: str, html: str) -> str:
    return f"<section><h2>{title}</h2>{html}</section>"


def page(
    name: str, headline: str, parts: Sequence[str], episodes: Sequence[Episode], total: int
) -> str:
    """The whole page, with the chosen `episodes` of `total` to be browsed."""
    style = _asset("report.css")
    script = '"use strict";\n' + "".join(map(_asset, SCRIPTS))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("report.html")).substitute(
        policy=policy,
        name=escape(name),
        style=style,
        script=script,
        headline=headline,
        sections="\n".join(parts),
        episodes=embedded(episodes),
        count=sections.episode_count(len(episodes), total),
    )


def _of_runs(name: str, headline: str, parts: Sequence[str], runs: Sequence[Run]) -> str:
    chosen: list[Episode] = []
    for run in runs:
        chosen += choose(run.episodes, MAX_EPISODES // len(runs))
    return page(name, headline, parts, chosen, sum(len(run.episodes) for run in runs))


def _asset(name: str) -> str:
    return resources.files("rl").joinpath("report_assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The hash by which a content security policy admits one inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
