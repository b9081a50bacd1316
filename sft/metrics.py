"""`metrics.jsonl`: one line per step and phase, the curve that every report is drawn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from configs.files import append_jsonl, read_jsonl, write_atomic
from model.hosts import host_index
from sft.tracking import Tracker


class Metrics:
    """The metrics file of a run folder.

    Keys are `area/name`, explained in docs/metrics.md; `time/*` depends on the machine, everything
    else must come out the same when a run is repeated or resumed. Of several hosts the first alone
    writes. `trackers` are told of every row.
    """

    def __init__(self, run: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._trackers = run / "metrics.jsonl", trackers

    def write(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Append one step."""
        if host_index() != 0:
            return
        row = {"phase": phase, "step": step, **values}
        append_jsonl(self._path, row)
        for tracker in self._trackers:
            tracker.write(row)

    def read(self, phase: str, step: int) -> list[dict]:
        """The rows of `phase` up to `step`, in order, on every host."""
        if not self._path.exists():
            return []
        return [r for r in read_jsonl(self._path) if r["phase"] == phase and r["step"] <= step]

    def rewind(self, phase: str, step: int) -> None:
        """Where `phase` begins or goes on, before its first `write`: forget its steps after `step`,
        which a resumed run will do again."""
        if host_index() != 0:
            return
        kept: list[dict] = []
        if self._path.exists():
            kept = [r for r in read_jsonl(self._path) if r["phase"] != phase or r["step"] <= step]
            write_atomic(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        for tracker in self._trackers:
            tracker.start(phase, [row for row in kept if row["phase"] == phase])
