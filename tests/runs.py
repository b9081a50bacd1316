"""What a run folder holds, for tests that compare two runs."""

from __future__ import annotations

import json
from pathlib import Path


def steps_of(run: Path) -> list[dict]:
    """Whole lines of the metrics so far, without what depends on the clock."""
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    lines = [json.loads(line) for line in whole.splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
