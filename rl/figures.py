"""The figures of a run for papers: each as SVG, and as PDF where matplotlib is installed.

The SVG files are drawn by the same code as the page's charts, in the page's light colours, with
everything they need inside them; the PDF files show the same data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import util
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from rl.report_charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Band,
    Line,
    finite_lines,
    plot,
    printable,
    short,
    smooth,
)

SHADES = ("#5a55d6", "#0c8f9c", "#c2477f", "#8b9096")  # --line-0 … of report.css
COLOURS = {"noop": "#8b9096", "teacher": "#b7791f", "sft": "#2f6fdb", "rl": "#16855b"}
_STYLE = (
    "text{font:11px Helvetica,Arial,sans-serif;fill:#44474b}.title{font-weight:600;fill:#1d1f21}"
    ".end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#e3e3dd}"
    "polyline{fill:none;stroke-width:1.7;stroke-linejoin:round}.raw{stroke-width:1;opacity:.32}.band{stroke:none;fill-opacity:.16}"
    + "".join(
        f".line-{n}{{stroke:{shade}}}circle.line-{n},.band.line-{n}{{fill:{shade}}}"
        for n, shade in enumerate(SHADES)
    )
)
_TOP, _FOOT, _ROW = 30, 34, 18  # of a dot plot, in user units


@dataclass(frozen=True)
class Lines:
    """A learning curve: `lines`, label -> (step, value) in order of steps; `bands`, intervals
    around some of them."""

    title: str
    lines: Mapping[str, Line]
    bands: Mapping[str, Band] = field(default_factory=dict)


@dataclass(frozen=True)
class Dot:
    """A value of the series `key` (a policy), with its interval where there is one."""

    key: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Dots:
    """A dot plot: a line for each row and dot of it. `unit` names the axis, which ends at `top`, or
    at the largest value."""

    title: str
    unit: str
    rows: Sequence[tuple[str, Sequence[Dot]]]
    top: float | None = None


Figure = Lines | Dots


def lines_of(series: Mapping[str, Mapping[str, Mapping[float, float]]]) -> list[Lines]:
    """A figure for each metric (metric -> label -> step -> value) that has a finite value."""
    found = [Lines(name, finite_lines(lines)) for name, lines in sorted(series.items())]
    return [figure for figure in found if any(figure.lines.values())]


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write each figure to `folder` under a name made from its title; the paths written."""
    with_pdf = util.find_spec("matplotlib") is not None
    written: list[Path] = []
    for figure in figures:
        stem = folder / (re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-") or "figure")
        while stem.with_suffix(".svg") in written:  # titles that differ in signs alone
            stem = stem.with_name(f"{stem.name}-2")
        write_atomic(stem.with_suffix(".svg"), svg(figure))
        written.append(stem.with_suffix(".svg"))
        if with_pdf:
            _pdf(figure, stem.with_suffix(".pdf"))
            written.append(stem.with_suffix(".pdf"))
    return written


def svg(figure: Figure) -> str:
    """The figure as one SVG file."""
    if isinstance(figure, Lines):
        head = f'<text class="title" x="{LEFT}" y="16">{_text(figure.title)}</text>'
        body = f'<g transform="translate(0 18)">{plot(figure.lines, figure.bands)}</g>'
        step = f'<text class="middle" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT + 24}">step</text>'
        keys = list(figure.lines) if len(figure.lines) > 1 else []
        shades = [SHADES[n % len(SHADES)] for n in range(len(keys))]
        legend = _legend(list(zip(keys, shades, strict=True)), HEIGHT + 42)
        return _file(head + body + step + legend, HEIGHT + (50 if keys else 32))
    return _dots(figure)


def _dots(figure: Dots) -> str:
    left = 14 + max(6 * len(name) for name, _ in figure.rows)
    scale, top = _axis(figure, left)
    bottom = _TOP + _ROW * sum(max(1, len(dots)) for _, dots in figure.rows)
    parts = [f'<text class="title" x="8" y="16">{_text(figure.title)}</text>']
    for quarter in range(5):
        x = scale(top * quarter / 4)
        parts.append(f'<line class="grid" x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{bottom}"/>')
        label = short(top * quarter / 4)
        parts.append(f'<text class="middle" x="{x}" y="{bottom + 14}">{label}</text>')
    y = _TOP + _ROW / 2 - 3
    for name, dots in figure.rows:
        middle = y + _ROW * (len(dots) - 1) / 2
        parts.append(f'<text class="end" x="{left - 10}" y="{middle + 4}">{_text(name)}</text>')
        for dot in dots:
            colour = _colour(dot.key)
            if dot.low is not None and dot.high is not None:
                parts.append(
                    f'<line x1="{scale(dot.low)}" x2="{scale(dot.high)}" y1="{y}" y2="{y}" '
                    f'stroke="{colour}" stroke-opacity=".4" stroke-width="4"/>'
                )
            parts.append(f'<circle cx="{scale(dot.value)}" cy="{y}" r="4" fill="{colour}"/>')
            y += _ROW
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{bottom + 29}">{_text(figure.unit)}</text>')
    keys = _keys(figure)
    parts.append(_legend(keys, bottom + 47))
    return _file("".join(parts), bottom + _FOOT + (20 if keys else 0))


def _axis(figure: Dots, left: float) -> tuple[Callable[[float], float], float]:
    """From value to user units, and the axis' end."""
    ends = [dot.value if dot.high is None else dot.high for _, dots in figure.rows for dot in dots]
    top = figure.top or max(ends, default=0.0) or 1.0
    room = WIDTH - RIGHT - 6 - left
    return lambda value: round(left + max(0.0, min(1.0, value / top)) * room, 1), top


def _keys(figure: Dots) -> list[tuple[str, str]]:
    """Label and colour of each series; none where every row has one dot, named by its row."""
    if all(len(dots) == 1 for _, dots in figure.rows):
        return []
    found = {dot.key: dot.label for _, dots in figure.rows for dot in dots}
    return [(label, _colour(key)) for key, label in found.items()]


def _colour(key: str) -> str:
    return COLOURS.get(key, SHADES[0])


def _legend(keys: Sequence[tuple[str, str]], y: float) -> str:
    parts, x = [], 14.0
    for label, colour in keys:
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 9}" y="{y}">{_text(label)}</text>')
        x += 28 + 6.2 * len(label)
    return "".join(parts)


def _file(body: str, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _pdf(figure: Figure, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # needs no display

    height = 2.2 if isinstance(figure, Lines) else 0.9 + 0.22 * sum(len(d) for _, d in figure.rows)
    data = io.BytesIO()
    # what a run calls its parts is text, never a formula
    with matplotlib.rc_context({"text.parse_math": False, "pdf.fonttype": 42}):
        canvas = Canvas(figsize=(3.6, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.set_title(printable(figure.title), loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        if isinstance(figure, Lines):
            _draw_lines(axes, figure)
        else:
            _draw_dots(axes, figure)
        canvas.savefig(data, format="pdf", metadata={"CreationDate": None})
    write_atomic(path, data.getvalue())


def _draw_lines(axes: Any, figure: Lines) -> None:
    for number, (label, line) in enumerate(figure.lines.items()):
        colour = SHADES[number % len(SHADES)]
        x, y = zip(*line, strict=True)
        if len(line) > 40:
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.6)
            x, y = zip(*smooth(line), strict=True)
        axes.plot(x, y, color=colour, linewidth=1.2, label=printable(label))
        if band := figure.bands.get(label):
            axes.fill_between(*zip(*band, strict=True), color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel("step", fontsize=8)
    if len(figure.lines) > 1:
        axes.legend(fontsize=7, frameon=False)


def _draw_dots(axes: Any, figure: Dots) -> None:
    places, names, y = [], [], 0.0
    for name, dots in figure.rows:
        places.append(y + (len(dots) - 1) / 2)
        names.append(printable(name))
        for dot in dots:
            colour = _colour(dot.key)
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [y, y], color=colour, alpha=0.4, linewidth=3)
            axes.plot(dot.value, y, "o", color=colour, markersize=4)
            y += 1
    for label, colour in _keys(figure):
        axes.plot([], [], "o", color=colour, markersize=4, label=printable(label))
    if _keys(figure):
        axes.legend(fontsize=7, frameon=False)
    axes.set_yticks(places, names)
    axes.set_ylim(y - 0.4, -0.6)
    axes.set_xlim(0, _axis(figure, 0.0)[1] * 1.02)
    axes.set_xlabel(printable(figure.unit), fontsize=8)
