"""The rows as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from tools.bench.compare import Row

_NAMES = {"train": "train step", "logprobs": "log-probabilities", "sample": "sampling"}
_APART = {"train": "max\n|Δ loss|", "logprobs": "max\n|Δ logp|", "sample": "other\nids"}


def show(rows: Sequence[Row], console: Console) -> None:
    """Print one table a measure."""
    for measure in dict.fromkeys(row.measure for row in rows):
        console.print(_table(measure, [row for row in rows if row.measure == measure]))
    console.print(
        "Tokens a second: median over rounds and its quartiles. remend ÷ peer: more than 1 where "
        "remend is faster, in parentheses where the peer computes something else.",
        style="dim",
    )


def _table(measure: str, rows: Sequence[Row]) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    table = Table(title=_NAMES[measure], title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("peer", no_wrap=True)
    headings = ("tokens\n/ s", "quartiles", "remend\n÷ peer", "tokens\n/ CPU s")
    for heading in (*headings, "first\ncall s", "peak\nMiB", _APART[measure]):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.value:.0f}",
            f"{row.low:.0f}–{row.high:.0f}",
            _ratio(row),
            f"{row.per_cpu_s:.0f}",
            f"{row.first_call_s:.1f}",
            f"{row.peak_mib:.0f}",
            difference(row),
        )
    return table


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    return f"{row.ratio:.2f}" if row.same else f"({row.ratio:.2f})"


def difference(row: Row) -> str:
    """How far the peer's results lie from the reference's, in the measure's own terms."""
    if row.difference is None:
        return "reference"
    return f"{row.difference:.1%}" if row.measure == "sample" else f"{row.difference:.1e}"
