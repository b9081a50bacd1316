"""Learning curves as inline SVG; the page's script adds the value under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins around the plot, in user units
MAX_POINTS = 400  # a line; more would not be seen
SMOOTH_FROM = 40  # a line with more points is drawn faint, with its moving average on top

Line = list[tuple[float, float]]
Band = list[tuple[float, float, float]]  # step, low, high


def curve(
    name: str,
    series: Mapping[str, Mapping[float, float]],
    bands: Mapping[str, Band] | None = None,
) -> str:
    """A chart of `series` (label -> step -> value, one line each) under the title `name`; `bands`:
    intervals around the lines of those labels.

    Values that are not finite are left out of the lines and counted beside the title.
    """
    lines = finite_lines(series)
    dropped = sum(map(len, series.values())) - sum(map(len, lines.values()))
    note = f' <span class="warn">{dropped} not finite</span>' if dropped else ""
    if not any(lines.values()):
        return f'<figure class="chart"><figcaption>{escape(name)}{note}</figcaption></figure>'
    lines = {label: _thin(line) for label, line in lines.items()}
    bands = bands or {}
    place = _placing(lines, bands)
    data = [[[*point, *place(*point)] for point in line] for line in lines.values()]
    labels = [f"{label}: " if label and len(lines) > 1 else "" for label in lines]
    last = ", ".join(short(line[-1][1]) if line else "–" for line in lines.values())
    return (
        f'<figure class="chart"><figcaption>{escape(name)}{note}<output>{last}</output>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(name)} by step, last {last}" '
        f'data-lines="{escape(json.dumps(data))}" data-labels="{escape(json.dumps(labels))}">'
        f"{plot(lines, bands)}</svg></figure>"
    )


def finite_lines(series: Mapping[str, Mapping[float, float]]) -> dict[str, Line]:
    """The finite points of each line, by step; a line without any keeps its place and colour."""
    return {
        label: [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
        for label, values in series.items()
    }


def plot(lines: Mapping[str, Line], bands: Mapping[str, Band] | None = None) -> str:
    """Grid, ticks, bands and lines as SVG elements, WIDTH × HEIGHT; needs at least one point."""
    bands = bands or {}
    place = _placing(lines, bands)
    (x_low, x_high), (y_low, y_high) = _domains(lines, bands)
    parts = []
    for tick in ticks(y_low, y_high):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" class="end">{short(tick)}</text>')
    for tick in ticks(x_low, x_high, whole=True):
        x = place(tick, y_low)[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 8}" class="middle">{short(tick)}</text>')
    for number, (label, line) in enumerate(lines.items()):
        shade = f"line-{number % 4}"
        if band := bands.get(label):
            around = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in band[::-1]]
            corners = " ".join("{},{}".format(*place(*point)) for point in around)
            parts.append(f'<polygon class="band {shade}" points="{corners}"/>')
        if len(line) > SMOOTH_FROM:
            parts.append(_path([place(*point) for point in line], f"{shade} raw"))
            parts.append(_path([place(*point) for point in smooth(line)], shade))
        else:
            parts.append(_path([place(*point) for point in line], shade))
            if len(line) <= SMOOTH_FROM // 2:
                dots = (place(*point) for point in line)
                parts += [f'<circle class="{shade}" cx="{x}" cy="{y}" r="2.2"/>' for x, y in dots]
    return "".join(parts)


def printable(text: str) -> str:
    """`text` without control characters and lone surrogates: what no file of a figure can hold, and
    what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _domains(
    lines: Mapping[str, Line], bands: Mapping[str, Band]
) -> tuple[tuple[float, float], tuple[float, float]]:
    points = [point for line in lines.values() for point in line]
    points += [(x, y) for band in bands.values() for x, *edges in band for y in edges]
    across = _domain([x for x, _ in points], pad=0.0)
    return across, _domain([y for _, y in points], pad=0.06)


def _placing(
    lines: Mapping[str, Line], bands: Mapping[str, Band]
) -> Callable[[float, float], tuple[float, float]]:
    """From step and value to user units."""
    (x_low, x_high), (y_low, y_high) = _domains(lines, bands)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    return place


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round numbers within [low, high]; only integers if `whole`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 0.25, 12.5, 3e-05, 12k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k" if abs(value) < 1e6 else f"{value:.2g}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}" if value else "0"


def _domain(values: list[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * pad or (abs(high) * 0.1 or 1.0 if high == low else 0.0)
    return low - room, high + room


def _thin(line: Line) -> Line:
    """At most MAX_POINTS points: of each run of neighbours the lowest and the highest."""
    if len(line) <= MAX_POINTS:
        return line
    runs = MAX_POINTS // 2
    kept: Line = []
    for run in range(runs):
        part = line[run * len(line) // runs : (run + 1) * len(line) // runs]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def smooth(line: Line) -> Line:
    """The mean over a window of a tenth of the line around each point."""
    half = max(1, len(line) // 20)
    means = []
    for index, (step, _) in enumerate(line):
        window = line[max(0, index - half) : index + half + 1]
        means.append((step, sum(value for _, value in window) / len(window)))
    return means


def _path(points: list[tuple[float, float]], kind: str) -> str:
    corners = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="{kind}" points="{corners}"/>'
