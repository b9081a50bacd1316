"""Two runs beside each other: what the comparison page shows, as HTML text."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from rl.episodes import POLICIES, by_policy, tool_use
from rl.evaluate import paired_gain, per_task
from rl.evaluate import success as success_of
from rl.report_sections import NOT_RUN, Series, duration, interval, mark, number, percent
from rl.run_folder import Run

NO_PAIRS = '<p class="none">no policy was evaluated on a task of both runs</p>'


def names(first: Path, second: Path) -> tuple[str, str]:
    """What to call two runs: their folders' names, with as many parents as tell them apart."""
    a, b = first.resolve().parts, second.resolve().parts
    for count in range(1, max(len(a), len(b)) + 1):
        one, other = "/".join(a[-count:]), "/".join(b[-count:])
        if one != other:
            return one, other
    raise ValueError("a run cannot be told from itself")


def differences(first: Run, second: Run) -> dict[str, dict[str, Any]]:
    """For each policy that both runs evaluated, over the tasks that both tried with it:

    success of each side (`first`, `second`), their paired `difference` (second - first) with its
    95 % interval, and `left_out`, the number of tasks that only one of them tried.
    """
    sides = [by_policy(run.episodes) for run in (first, second)]
    found: dict[str, dict[str, Any]] = {}
    for policy in sides[0]:
        if policy not in sides[1]:
            continue
        a, b = (per_task(side[policy]) for side in sides)
        common = a.keys() & b.keys()
        if common:
            one, other = ([e for e in side[policy] if e.task in common] for side in sides)
            found[policy] = {
                "first": success_of(one),
                "second": success_of(other),
                "difference": paired_gain(
                    {task: a[task] for task in sorted(common)},
                    {task: b[task] for task in sorted(common)},
                ),
                "left_out": len(a.keys() ^ b.keys()),
            }
    return found


def headline(names: Sequence[str], found: Mapping[str, dict[str, Any]]) -> str:
    """The difference of the last policy that both have, with no more certainty than it has."""
    policy = next((p for p in reversed(POLICIES) if p in found), next(iter(found), None))
    first, second = map(escape, names)
    if policy is None:
        return f"{first} and {second} have no held-out task in common."
    row = found[policy]["difference"]
    label = escape(POLICIES.get(policy, policy))
    points = f"{abs(row['mean']) * 100:.1f} points {'more' if row['mean'] >= 0 else 'fewer'}"
    sentence = (
        f"{label} of <strong>{second}</strong> repairs <strong>{points}</strong> of {row['n']} "
        f"held-out bugs than that of <strong>{first}</strong> "
        f"(paired 95&nbsp;% interval {row['low'] * 100:+.1f} to {row['high'] * 100:+.1f})."
    )
    certain = row["low"] > 0 or row["high"] < 0
    return sentence if certain else f"{sentence} The interval includes zero."


def success(names: Sequence[str], found: Mapping[str, dict[str, Any]]) -> str:
    """Policies × both runs, with the paired difference and its interval drawn."""
    if not found:
        return NO_PAIRS
    rows = []
    for policy, row in found.items():
        gap = row["difference"]
        cells = "".join(_rate(row[side]) for side in ("first", "second"))
        # -1 … +1 on the axis from 0 to 1
        drawn = interval(policy, *((gap[key] + 1) / 2 for key in ("mean", "low", "high")))
        label = escape(POLICIES.get(policy, policy))
        rows.append(
            f'<tr><th scope="row">{mark(policy)}{label}</th>{cells}'
            f'<td class="number"><b>{gap["mean"] * 100:+.1f}</b></td>'
            f'<td class="number">{gap["low"] * 100:+.1f} to {gap["high"] * 100:+.1f}</td>'
            f'<td class="number">{gap["n"]}</td><td>{drawn}</td></tr>'
        )
    left_out = sum(row["left_out"] for row in found.values())
    note = f", {left_out} left out that only one run tried" if left_out else ""
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    return (
        '<p class="hint">Over the tasks that both runs tried with that policy'
        f"{note}. Difference in points, second less first, with its paired 95&nbsp;% bootstrap "
        'interval over tasks.</p><table class="success"><thead><tr><th>Policy</th>'
        f'{heads}<th class="number">Difference</th><th class="number">95&nbsp;% interval</th>'
        '<th class="number">Tasks</th><th class="third"><span class="scale"><i>−100</i><i>−50</i>'
        f"<i>0</i><i>+50</i><i>+100</i></span></th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table>"
    )


def gains(runs: Sequence[Run]) -> str:
    """What RL added to SFT in each run."""
    rows = []
    for run in runs:
        mean, low, high = (number(run.summary, "gain", key) for key in ("mean", "low", "high"))
        if mean is None or low is None or high is None:
            cells = '<td class="none" colspan="2">not run</td>'
        else:
            cells = (
                f'<td class="number"><b>{mean * 100:+.1f}</b></td>'
                f'<td class="number">{low * 100:+.1f} to {high * 100:+.1f}</td>'
            )
        rows.append(f'<tr><th scope="row">{escape(run.name)}</th>{cells}</tr>')
    return (
        '<table><thead><tr><th>Run</th><th class="number">Gain in points</th>'
        f'<th class="number">95&nbsp;% interval</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table>"
    )


def curves(runs: Sequence[Run]) -> dict[str, Series]:
    """Metric -> run -> step -> value; of a run of several seeds the mean of those that have it."""
    metrics = sorted({metric for run in runs for metric in run.curves})
    return {
        metric: {run.name: _mean(run.curves.get(metric, {})) for run in runs} for metric in metrics
    }


def _mean(lines: Series) -> dict[float, float]:
    steps = sorted({step for line in lines.values() for step in line})
    return {step: fmean([v[step] for v in lines.values() if step in v]) for step in steps}


def tools(runs: Sequence[Run]) -> str:
    """Calls an episode of each tool, for every policy that works with tools, run beside run."""
    sides = {
        (policy, run.name): episodes
        for policy in ("teacher", "sft", "rl")
        for run in runs
        for episodes in [by_policy(run.episodes).get(policy)]
        if episodes
    }
    use = tool_use(sides)
    if not use:
        return NOT_RUN
    heads = "".join(
        f'<th class="number">{mark(policy)}{POLICIES[policy]}<br>{escape(run)}</th>'
        for policy, run in sides
    )
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(tool)}</code></th>'
        + "".join(f'<td class="number">{row[side]:.2f}</td>' for side in sides)
        + "</tr>"
        for tool, row in use.items()
    )
    return (
        '<p class="hint">Calls per episode.</p><table><thead><tr><th>Tool</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def made(runs: Sequence[Run]) -> str:
    """Time and memory of each run, and the lines in which their configurations differ."""
    facts = []
    for run in runs:
        wall, peak = number(run.summary, "wall_s"), number(run.summary, "peak_rss_gib")
        facts.append(
            f'<tr><th scope="row">{escape(run.name)}</th>'
            f'<td class="number">{"–" if wall is None else duration(wall)}</td>'
            f'<td class="number">{"–" if peak is None else f"{peak:.1f} GiB"}</td>'
            f'<td class="number">{len(run.episodes):,}</td></tr>'
        )
    table = (
        '<table><thead><tr><th>Run</th><th class="number">Wall time</th>'
        '<th class="number">Peak memory</th><th class="number">Episodes</th></tr></thead>'
        f"<tbody>{''.join(facts)}</tbody></table>"
    )
    return table + _config_difference(*runs)


def _config_difference(first: Run, second: Run) -> str:
    if not first.config or not second.config:
        return '<p class="none">no config.yaml to compare</p>'
    lines = difflib.unified_diff(
        first.config.splitlines(), second.config.splitlines(), first.name, second.name, "", "", 3
    )
    shown = []
    for line in lines:
        kind = {"+": "added", "-": "removed", "@": "place"}.get(line[:1], "")
        kind = "place" if line.startswith(("+++", "---")) else kind
        text = escape(line.rstrip("\n")) or " "
        shown.append(f'<span class="{kind}">{text}</span>' if kind else f"{text}\n")
    if not shown:
        return '<p class="none">the configurations are the same</p>'
    return f"<pre>{''.join(shown)}</pre>"


def _rate(row: Mapping[str, float]) -> str:
    return (
        f'<td class="number"><b>{percent(row["mean"])}</b><br>'
        f'<span class="none">{row["low"] * 100:.1f} – {row["high"] * 100:.1f}</span></td>'
    )
