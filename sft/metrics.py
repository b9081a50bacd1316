"""`metrics.jsonl`: one line per step and phase, the curve that every report is drawn from."""

from __future__ import annotations

import json
from pathlib import Path

from configs.files import append_jsonl, read_jsonl, write_atomic
from model.hosts import host_index


class Metrics:
    """The metrics file of a run folder.

    Keys are `area/name`; `time/*` depends on the machine, everything else must come out the same
    when a run is repeated or resumed. Of several hosts the first alone writes.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.jsonl"

    def write(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Append one step."""
        if host_index() == 0:
            append_jsonl(self._path, {"phase": phase, "step": step, **values})

    def rewind(self, phase: str, step: int) -> None:
        """Forget the steps of `phase` after `step`: what a resumed run will do again."""
        if host_index() != 0 or not self._path.exists():
            return
        kept = [r for r in read_jsonl(self._path) if r["phase"] != phase or r["step"] <= step]
        write_atomic(self._path, "".join(json.dumps(r) + "\n" for r in kept))
