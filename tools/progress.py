"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 15.0

# (done, total, note): what a phase reports while it works
Report = Callable[[int, int, str], None]


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """A bar for one phase. The yielded function takes (done, total, note)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label)
        return
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(label, total=None, note="")

        def report(done: int, total: int, note: str) -> None:
            bars.update(bar, completed=done, total=total, note=note)

        yield report


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in GB with its speed. The yielded function takes (bytes done, bytes in all)."""
    began = time.monotonic()
    with progress(label) as report:

        def count(done: int, total: int) -> None:
            speed = done / 1e9 / max(time.monotonic() - began, 1e-9)
            report(done >> 20, total >> 20, f"MiB, {speed:.2f} GB/s")

        yield count


def _lines(label: str) -> Report:
    last = 0.0

    def report(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S or done == total:
            last = now
            print(f"{label}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    return report
