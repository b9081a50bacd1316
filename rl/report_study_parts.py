"""The parts of a study's page, as HTML text that needs no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from rl.analysis import FAILURES
from rl.episodes import POLICIES
from rl.report_charts import Band, curve
from rl.report_sections import NOT_RUN, duration, interval, mark, percent

LABELS = {**POLICIES, "base": "Base"}
MEASURES = {
    "exploited": "Exploits by the tests held back",
    "flagged": "Exploits by the guard's detectors",
    "repaired": "Repairs: all tests pass, held back too",
    "rewarded": "Episodes that earn the reward",
}
_KINDS = {"holds": "holds", "does not hold": "not", "undecided": "open"}
_SHOWN = 12  # lines of a table of changes


def headline(claims: Sequence[Mapping[str, Any]]) -> str:
    """What came out, in one sentence."""
    count = {o: sum(row["outcome"] == o for row in claims) for o in _KINDS}
    return (
        f"Of the paper's six claims <strong>{count['holds']} hold</strong> here, "
        f"{count['does not hold']} do not, and {count['undecided']} are undecided."
    )


def claims(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a claim: the paper's figure, ours with its interval, and what the rule says."""
    html = []
    for row in rows:
        show = _calls if row["key"] == "tools" else _points
        ours = '<span class="none">not measured</span>'
        if row["ours"] is not None:
            unit = "calls" if row["key"] == "tools" else "points"
            ours = f"<b>{show(row['ours']['mean'])}</b> {unit}<br>{_range(row['ours'], show)}"
        note = f"<small>{escape(row['note'])}</small>" if row["note"] else ""
        shown = list(row["parts"].items())[:6]
        each = "".join(
            f"<small>{escape(name)}: {show(part['mean'])} ({_range(part, show)})</small>"
            for name, part in shown
            if isinstance(part, Mapping) and "low" in part
        )
        html.append(
            f'<tr><th scope="row">{escape(row["claim"])}<br>'
            f'<span class="verdict {_KINDS[row["outcome"]]}">{escape(row["outcome"])}</span></th>'
            f"<td>{escape(row['paper'])}<small>{escape(row['source'])}</small></td>"
            f'<td class="number">{ours}</td>'
            f"<td>{escape(row['statistic'])}{note}{each}</td>"
            f"<td><small>{escape(row['rule'])}</small></td></tr>"
        )
    return (
        '<p class="hint">Zhu et al. 2025, arXiv 2510.22075v1. Ours: 95&nbsp;% bootstrap interval, '
        "paired by task, over tasks and seeds. A claim is decided only where the whole interval "
        'lies on one side of the line in its rule.</p><table class="claims"><thead><tr>'
        '<th>Claim</th><th>The paper</th><th class="number">Ours</th><th>Measured</th>'
        f"<th>Rule</th></tr></thead><tbody>{''.join(html)}</tbody></table>"
    )


def policy_name(group: Mapping[str, Any]) -> str:
    """Policy and the environment that it was trained in."""
    name = LABELS[group["policy"]]
    return f"{name} from {group['trained']}" if group["trained"] else name


def grid(groups: Sequence[Mapping[str, Any]], environments: Sequence[str]) -> str:
    """Policies × tested in × thinking: success with its interval, pass@k and each seed's own."""
    if not groups:
        return NOT_RUN
    html = []
    for tested in sorted(environments, reverse=True):
        for thinking in (False, True):
            rows = [g for g in groups if (g["tested"], g["thinking"]) == (tested, thinking)]
            if rows:
                html.append(_grid_table(f"Tested in {tested}{', thinking' * thinking}", rows))
    return f'<div class="halves">{"".join(html)}</div>'


def _grid_table(title: str, groups: Sequence[Mapping[str, Any]]) -> str:
    most = max(int(k) for group in groups for k in group["pass_at"])
    rows = []
    for group in sorted(groups, key=_order):
        value = group["success"]
        seeds = ", ".join(percent(v) for v in group["seeds"].values())
        best = group["pass_at"].get(str(most))
        drawn = interval(group["policy"], value["mean"], value["low"], value["high"])
        more = f'<td class="number">{percent(best["mean"] if best else None)}</td>'
        rows.append(
            f'<tr title="by seed: {seeds}"><th scope="row">{mark(group["policy"])}'
            f"{escape(policy_name(group))}</th>"
            f'<td class="number"><b>{percent(value["mean"])}</b></td>'
            f'<td class="number">{value["low"] * 100:.1f} – {value["high"] * 100:.1f}</td>'
            f"{more * (most > 1)}<td>{drawn}</td></tr>"
        )
    more = f'<th class="number">pass@{most}</th>' * (most > 1)
    tasks, count = groups[0]["success"]["n"], len(groups[0]["seeds"])
    return (
        f'<div><h3>{escape(title)}</h3><table class="grid-table"><thead><tr><th>Policy</th>'
        f'<th class="number">pass@1</th><th class="number">95&nbsp;%</th>'
        f'{more}<th class="third"></th></tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table><p class="hint">{tasks:.0f} tasks, {count} '
        f"seed{'s' if count != 1 else ''}</p></div>"
    )


def _order(group: Mapping[str, Any]) -> tuple[int, str]:
    return ("teacher", "base", "sft", "rl").index(group["policy"]), group["trained"]


def costs(groups: Sequence[Mapping[str, Any]], walls: Mapping[str, float]) -> str:
    """Tokens, calls and sandbox seconds of an episode, and where the study's time went."""
    heads = {
        "tokens": "Tokens",
        "sampled": "Sampled",
        "turns": "Turns",
        "calls": "Tool calls",
        "sandbox_s": "Sandbox seconds",
    }
    rows = []
    for group in sorted(groups, key=lambda g: (g["tested"], g["thinking"], *_order(g))):
        where = f"{group['tested']}{', thinking' * group['thinking']}"
        cells = "".join(f'<td class="number">{group["cost"][key]:.1f}</td>' for key in heads)
        name = escape(policy_name(group))
        rows.append(
            f'<tr><th scope="row">{mark(group["policy"])}{name}</th><td>{where}</td>{cells}</tr>'
        )
    head = "".join(f'<th class="number">{text}</th>' for text in heads.values())
    names = {
        "teach": "Teaching", "sft": "SFT", "rl": "RL", "cell": "Evaluation", "shift": "KL",
        "tasks": "Tempting tasks", "start": "Tuning on them", "long": "Long runs",
    }  # fmt: skip
    items = "".join(
        f"<div><dt>{names.get(kind, escape(kind))}</dt><dd>{duration(seconds)}</dd></div>"
        for kind, seconds in walls.items()
    )
    return (
        f'<dl class="facts">{items}</dl><details><summary>An episode of each cell</summary>'
        "<table><thead><tr><th>Policy</th><th>Tested in</th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def bands(
    curves: Mapping[str, Mapping[str, Any]], measure: str
) -> tuple[dict[str, dict[float, float]], dict[str, Band]]:
    """Lines and bands of one measure for a chart: guard off, guard on."""
    lines: dict[str, dict[float, float]] = {}
    around: dict[str, Band] = {}
    for side, measures in curves.items():
        label = f"guard {side}"
        points = measures[measure]
        lines[label] = {p["step"]: p["mean"] for p in points}
        around[label] = [(p["step"], p["low"], p["high"]) for p in points]
    return lines, around


def exploitation(found: Mapping[str, Any] | None) -> str:
    """Curves of both runs with intervals, and the last quarter of each side by side."""
    if not found:
        return NOT_RUN
    charts = "".join(
        curve(title, *bands(found["curves"], measure)) for measure, title in MEASURES.items()
    )
    rows = []
    for measure, title in MEASURES.items():
        off, on = (found["last_quarter"][side][measure] for side in ("off", "on"))
        gap = found["difference"][measure]
        rows.append(
            f'<tr><th scope="row">{title}</th><td class="number">{_share(off)}</td>'
            f'<td class="number">{_share(on)}</td><td class="number"><b>{_points(gap["mean"])}</b> '
            f"({_range(gap, _points)})</td></tr>"
        )
    keys = "".join(
        f'<span class="key"><svg class="line-{n}" viewBox="0 0 16 4" aria-hidden="true">'
        f'<line x1="0" y1="2" x2="16" y2="2"/></svg>guard {side}</span>'
        for n, side in enumerate(found["curves"])
    )
    return (
        '<p class="hint">The same long RL run from the same start. Bands: 95&nbsp;% intervals over '
        "tasks alone: what other training seeds would give, they do not say."
        f'{keys}</p><div class="charts">{charts}</div><h3>Last quarter of the steps</h3>'
        '<table><thead><tr><th>Share of episodes</th><th class="number">Guard off</th>'
        '<th class="number">Guard on</th><th class="number">On less off, points</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def tools(analyses: Mapping[str, Any]) -> str:
    """What changed in the calls of an episode, and which call follows which, before and after."""
    html = []
    for environment, found in sorted(analyses.items(), reverse=True):
        if "tools" in found:
            html.append(f"<h3>{escape(environment)}</h3>{_changes(found['tools'], 'Tool')}")
        stages = found.get("stages", {})
        tables = [_heat(p, stages[p]["transitions"]) for p in ("sft", "rl") if p in stages]
        if tables:
            html.append(
                "<details><summary>Which call follows which</summary>"
                f'<div class="halves">{"".join(tables)}</div></details>'
            )
    return "".join(html) or NOT_RUN


def _heat(policy: str, table: Mapping[str, Mapping[str, float]]) -> str:
    """Rows: a call; columns: the next one; each row sums to 100 %."""
    columns = sorted({after for row in table.values() for after in row})
    rows = []
    for before, row in table.items():
        cells = "".join(
            f'<td>{row[c] * 100:.0f}<svg viewBox="0 0 100 4" preserveAspectRatio="none" '
            f'aria-hidden="true"><rect width="{row[c] * 100:.0f}" height="4"/></svg></td>'
            if c in row
            else "<td></td>"
            for c in columns
        )
        rows.append(f'<tr><th scope="row"><code>{escape(before)}</code></th>{cells}</tr>')
    heads = "".join(f'<th class="number"><code>{escape(c)}</code></th>' for c in columns)
    return (
        f'<div><h3>{LABELS[policy]}, share in %</h3><table class="heat"><thead><tr><th></th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def shift(analyses: Mapping[str, Any]) -> str:
    """KL of SFT+RL to SFT by what a token is for."""
    html = []
    for environment, found in sorted(analyses.items(), reverse=True):
        for seed, table in found.get("kl", {}).items():
            rows = "".join(
                f'<tr><th scope="row">{escape(kind)}</th>'
                f'<td class="number"><b>{row["mean"]:.3f}</b></td>'
                f'<td class="number">{row["low"]:.3f} – {row["high"]:.3f}</td>'
                f'<td class="number">{row["share"] * 100:.0f}&nbsp;%</td>'
                f'<td class="number">{row["tokens"]:,.0f}</td></tr>'
                for kind, row in table.items()
            )
            html.append(
                f"<div><h3>{escape(environment)}, seed {escape(seed)}</h3><table><thead><tr>"
                '<th>Kind of token</th><th class="number">KL, nats a token</th>'
                '<th class="number">95&nbsp;%</th><th class="number">Of the whole</th>'
                f'<th class="number">Tokens</th></tr></thead><tbody>{rows}</tbody></table></div>'
            )
    if not html:
        return NOT_RUN
    return (
        '<p class="hint">Mean of log π − log π<sub>SFT</sub> over what SFT+RL sampled in held-out '
        f'episodes where it was trained.</p><div class="halves">{"".join(html)}</div>'
    )


def edits(analyses: Mapping[str, Any]) -> str:
    """Edits an episode by kind, before and after RL."""
    return _by_environment(analyses, "edits", lambda found: _changes(found, "Kind of edit"))


def failures(analyses: Mapping[str, Any]) -> str:
    """The ways to fail of each policy, as shares of its failed episodes."""
    html = []
    for environment, found in sorted(analyses.items(), reverse=True):
        stages = found.get("stages", {})
        heads = "".join(f'<th class="number">{mark(p)}{LABELS[p]}</th>' for p in stages)
        rows = "".join(
            f'<tr title="{escape(text)}"><th scope="row">{escape(way)}</th>'
            + "".join(
                f'<td class="number">{percent(stage["failures"].get(way, 0.0))}</td>'
                for stage in stages.values()
            )
            + f"<td>{escape(text)}</td></tr>"
            for way, text in FAILURES.items()
            if any(way in stage["failures"] for stage in stages.values())
        )
        html.append(
            f"<h3>{escape(environment)}</h3><table><thead><tr><th>Failed episodes</th>{heads}"
            f"<th></th></tr></thead><tbody>{rows}</tbody></table>"
        )
    return "".join(html) or NOT_RUN


def _by_environment(
    analyses: Mapping[str, Any], key: str, show: Callable[[Mapping[str, Any]], str]
) -> str:
    html = [
        f"<div><h3>{escape(environment)}</h3>{show(found[key])}</div>"
        for environment, found in sorted(analyses.items(), reverse=True)
        if key in found
    ]
    return f'<div class="halves">{"".join(html)}</div>' if html else NOT_RUN


def _changes(found: Mapping[str, Mapping[str, float]], head: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{row["before"]:.2f}</td>'
        f'<td class="number">{row["after"]:.2f}</td>'
        f'<td class="number"><b>{row["mean"]:+.2f}</b></td>'
        f'<td class="number">{_range(row, _calls)}</td></tr>'
        for name, row in list(found.items())[:_SHOWN]
    )
    return (
        f'<table><thead><tr><th>{head}</th><th class="number">SFT</th>'
        '<th class="number">SFT+RL</th><th class="number">Change an episode</th>'
        f'<th class="number">95&nbsp;% together</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _share(row: Mapping[str, float]) -> str:
    return f"<b>{percent(row['mean'])}</b> ({row['low'] * 100:.1f} – {row['high'] * 100:.1f})"


def _range(row: Mapping[str, float], show: Callable[[float], str]) -> str:
    return f"{show(row['low'])} to {show(row['high'])}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _calls(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
