"""A bar for each count, as one SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from rl.report_charts import printable

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 520, 150, 60, 20, 30
_STYLE = (
    "text{font:11px Helvetica,Arial,sans-serif;fill:#44474b}.title{font-weight:600;fill:#1d1f21}"
    ".end{text-anchor:end}rect.bar{fill:#5a55d6}"
)


def bars(title: str, counts: Mapping[str, int]) -> str:
    """Horizontal bars in the order of `counts`, each with its number."""
    most = max(counts.values(), default=0) or 1
    height = _TOP + _ROW * len(counts) + 8
    parts = [f'<text class="title" x="8" y="18">{escape(printable(title))}</text>']
    for place, (name, count) in enumerate(counts.items()):
        y = _TOP + _ROW * place
        wide = round((_WIDTH - _LEFT - _RIGHT) * count / most, 1)
        label = escape(printable(name[:26]))
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{y + 12}">{label}</text>')
        parts.append(f'<rect class="bar" x="{_LEFT}" y="{y + 2}" width="{wide}" height="13"/>')
        parts.append(f'<text x="{_LEFT + wide + 5}" y="{y + 12}">{count}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img"><title>{escape(printable(title))}</title>'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )
