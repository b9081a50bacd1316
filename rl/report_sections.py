"""The parts of the report that need no script: headline, tables, bars and curves, as HTML text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rl.episodes import POLICIES
from rl.report_charts import curve

# shown first, in this order; every other metric follows under "more"
MAIN_CURVES = (
    "pretrain/loss",
    "sft/loss",
    "rl/reward",
    "rl/success",
    "rl/kl_ref",
    "rl/kl_old",
    "rl/entropy",
    "mismatch/max",
    "mismatch/mean",
)
_QUARTERS = (0, 25, 50, 75, 100)  # grid lines of the success axis, in percent
_CURVES_HINT = "By step; over a long line its moving average. Point for values."
NOT_RUN = '<p class="none">not run</p>'

Series = dict[str, dict[float, float]]  # one line a seed: step -> value


def headline(summary: Mapping[str, Any]) -> str:
    """What came out, in one sentence, with no more certainty than the interval has."""
    sft, rl = (number(summary, "success", policy, "mean") for policy in ("sft", "rl"))
    gain, low, high = (number(summary, "gain", key) for key in ("mean", "low", "high"))
    if rl is None and sft is None:
        return "Not evaluated yet."
    if rl is None or sft is None:
        done, missing = ("SFT", "RL") if rl is None else ("SFT+RL", "SFT")
        share = percent(sft if rl is None else rl)
        return f"{done} repairs {share} of held-out bugs; {missing} has not been evaluated."
    start = f"SFT+RL repairs <strong>{percent(rl)}</strong> of held-out bugs"
    if gain is None or low is None or high is None:
        return f"{start}, SFT {percent(sft)}."
    word = "more" if gain >= 0 else "fewer"
    sentence = (
        f"{start}, <strong>{abs(gain) * 100:.1f} points {word}</strong> than SFT alone "
        f"(paired 95&nbsp;% interval {low * 100:+.1f} to {high * 100:+.1f})."
    )
    return sentence if low > 0 or high < 0 else f"{sentence} The interval includes zero."


def success(summary: Mapping[str, Any]) -> str:
    """The table {no-op, teacher, SFT, SFT+RL} × held-out success, with intervals drawn."""
    rows = []
    for policy, label in POLICIES.items():
        mean, low, high, n = (
            number(summary, "success", policy, key) for key in ("mean", "low", "high", "n")
        )
        if mean is None:
            cells = '<td class="none" colspan="4">not run</td>'
        else:
            low, high = (mean if edge is None else edge for edge in (low, high))
            cells = (
                f'<td class="number"><b>{percent(mean)}</b></td>'
                f'<td class="number">{low * 100:.1f} – {high * 100:.1f}</td>'
                f'<td class="number">{"–" if n is None else f"{n:.0f}"}</td>'
                f"<td>{interval(policy, mean, low, high)}</td>"
            )
        rows.append(f'<tr><th scope="row">{mark(policy)}{label}</th>{cells}</tr>')
    return (
        '<table class="success"><thead><tr><th>Policy</th><th class="number">Held-out success</th>'
        '<th class="number">95&nbsp;% interval</th><th class="number">n</th>'
        '<th class="wide"><span class="scale"><i>0</i><i>25</i><i>50</i><i>75</i><i>100&nbsp;%</i>'
        f"</span></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def facts(summary: Mapping[str, Any]) -> str:
    """How the run was made: time, memory, seeds, isolation, and where the time went."""
    found: list[tuple[str, str]] = []
    wall, peak = number(summary, "wall_s"), number(summary, "peak_rss_gib")
    seeds, isolation = summary.get("seeds"), summary.get("isolation")
    if wall is not None:
        found.append(("Wall time", duration(wall)))
    if peak is not None:
        found.append(("Peak memory", f"{peak:.1f} GiB"))
    if seeds is not None:
        listed = seeds if isinstance(seeds, list) else [seeds]
        found.append(("Seeds", escape(", ".join(map(str, listed)))))
    if summary.get("environment") is not None:
        found.append(("Environment", escape(str(summary["environment"]))))
    if isolation is not None:
        plain = '<span class="warn">none: plain processes</span>'
        text = {"bwrap": "bubblewrap", "plain": plain}.get(isolation) or escape(str(isolation))
        found.append(("Isolation", text))
    phases = summary.get("phases")
    if isinstance(phases, dict):
        for name in phases:
            seconds = number(phases, name)
            if seconds is not None:
                label = {"sft": "SFT", "rl": "RL"}.get(name, name.capitalize())
                found.append((escape(label), duration(seconds)))
    items = "".join(f"<div><dt>{label}</dt><dd>{text}</dd></div>" for label, text in found)
    return f'<dl class="facts">{items}</dl>' if found else ""


def curves(found: Mapping[str, Series], legend: Sequence[str] = ()) -> str:
    """One small chart a metric; `legend` names the lines where they are the same in all."""
    if not found:
        return NOT_RUN
    main = [name for name in MAIN_CURVES if name in found] or sorted(found)[:6]
    more = [name for name in sorted(found) if name not in main]
    keys = "".join(
        f'<span class="key"><svg class="line-{n % 4}" viewBox="0 0 16 4" aria-hidden="true">'
        f'<line x1="0" y1="2" x2="16" y2="2"/></svg>{escape(name)}</span>'
        for n, name in enumerate(legend)
    )
    html = f'<p class="hint">{_CURVES_HINT}{keys}</p>'
    html += f'<div class="charts">{"".join(curve(name, found[name]) for name in main)}</div>'
    if more:
        charts = "".join(curve(name, found[name]) for name in more)
        html += (
            f"<details><summary>{len(more)} more metrics</summary>"
            f'<div class="charts">{charts}</div></details>'
        )
    return html


def tool_use(use: Mapping[str, Mapping[str, float]], episodes: Mapping[str, int]) -> str:
    """Calls an episode of each tool in held-out episodes, before and after RL.

    `use`: tool -> policy -> mean; `episodes`: how many of each policy were counted.
    """
    if not use:
        return NOT_RUN
    top = max((value for row in use.values() for value in row.values()), default=0.0) or 1.0
    rows = []
    for name, row in use.items():
        sft, rl = row.get("sft"), row.get("rl")
        change = "–" if sft is None or rl is None else f"{rl - sft:+.2f}"
        bars = "".join(_bar(policy, value / top) for policy, value in row.items())
        rows.append(
            f'<tr><th scope="row"><code>{escape(name)}</code></th>'
            f'<td class="number">{_per_episode(sft)}</td>'
            f'<td class="number">{_per_episode(rl)}</td>'
            f'<td class="number">{change}</td><td><div class="pair">{bars}</div></td></tr>'
        )
    counted = f"{episodes.get('sft', 0)} SFT, {episodes.get('rl', 0)} SFT+RL"
    return (
        '<table><thead><tr><th>Tool</th><th class="number">SFT</th><th class="number">SFT+RL</th>'
        '<th class="number">Change</th><th class="wide">Calls per held-out episode '
        f"({counted})</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def breakdown(summary: Mapping[str, Any]) -> str:
    """Held-out success by mutation operator and by package, where the summary has it."""
    parts = []
    for key, label in (("per_operator", "Mutation operator"), ("per_package", "Package")):
        table = summary.get(key)
        if not isinstance(table, dict) or not table:
            continue
        rows = []
        for name in sorted(table):
            cells = []
            for policy in POLICIES:
                value = rate(table[name], policy)
                bar = "" if value is None else _bar(policy, value)
                cells.append(f'<td class="number">{percent(value)}{bar}</td>')
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
        heads = "".join(f'<th class="number">{label}</th>' for label in POLICIES.values())
        parts.append(
            f"<table><thead><tr><th>{label}</th>{heads}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    return "".join(parts) or NOT_RUN


def agreement(summary: Mapping[str, Any]) -> str:
    """How far the verdicts of the two environments agree, policy by policy; "" if one judged."""
    found = summary.get("agreement")
    cells = ("both_pass", "simplified_only", "full_only", "both_fail", "n")
    rows = []
    for policy, label in POLICIES.items() if isinstance(found, dict) else ():
        counts = [number(found, policy, cell) for cell in cells]
        if None in counts:
            continue
        agree, kappa = (number(found, policy, key) for key in ("agree", "kappa"))
        texts = [f"{count:.0f}" for count in counts if count is not None]
        texts += [percent(agree), "–" if kappa is None else f"{kappa:.2f}"]
        columns = "".join(f'<td class="number">{text}</td>' for text in texts)
        rows.append(f'<tr><th scope="row">{mark(policy)}{label}</th>{columns}</tr>')
    heads = ("Both pass", "Simplified only", "Full only", "Neither", "n", "Agree", "Kappa")
    columns = "".join(f'<th class="number">{head}</th>' for head in heads)
    table = f"<table><thead><tr><th>Policy</th>{columns}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"{table}</table>" if rows else ""


def rate(row: Any, policy: str) -> float | None:
    """The success of a policy in a row of a breakdown: a number, or a mapping with its mean."""
    value = number(row, policy)
    return number(row, policy, "mean") if value is None else value


def episode_count(shown: int, total: int) -> str:
    if shown == total:
        return f"{total:,} episodes"
    return f"{shown:,} of {total:,} episodes; all are in the run's trajectories folder"


def series(metrics: list[dict[str, Any]]) -> dict[str, Series]:
    """Metric -> seed -> step -> value; a step that was run again after a resume counts once."""
    found: dict[str, Series] = {}
    for record in metrics:
        phase, step = record.get("phase"), number(record, "step")
        if step is None:
            continue
        line = f"seed {record['seed']}" if "seed" in record else ""
        for key in record:
            value = record[key]
            if key in ("step", "seed") or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)):
                name = key if "/" in key else f"{phase}/{key}"
                found.setdefault(name, {}).setdefault(line, {})[step] = float(value)
    return found


def interval(policy: str, mean: float, low: float, high: float) -> str:
    """A dot at the mean on a bar from low to high, on an axis from 0 to 1."""
    left, right, dot = (f"{max(0.0, min(1.0, x)):.1%}" for x in (low, high, mean))
    grid = "".join(f'<line class="grid" x1="{x}%" y1="0" x2="{x}%" y2="16"/>' for x in _QUARTERS)
    return (
        f'<svg class="interval {policy}" aria-hidden="true">{grid}'
        f'<line class="range" x1="{left}" y1="8" x2="{right}" y2="8"/>'
        f'<circle cx="{dot}" cy="8" r="5"/></svg>'
    )


def _bar(policy: str, share: float) -> str:
    return (
        f'<svg class="bar {policy}" viewBox="0 0 400 8" preserveAspectRatio="none" '
        f'aria-hidden="true"><rect width="{share * 400:.1f}" height="8"/></svg>'
    )


def mark(policy: str) -> str:
    return f'<span class="mark {policy}"></span>'


def _per_episode(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}&nbsp;%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def number(data: Any, *path: str) -> float | None:
    """The finite number at `path` in nested mappings, or None."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(data, bool) or not isinstance(data, (int, float)):
        return None
    return float(data) if math.isfinite(data) else None
