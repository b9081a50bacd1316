"""What a run folder holds, for tests that compare two runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
METRICS = re.findall(r"^\| `([a-z]+/[^`]+)` \|", TABLE.read_text(), re.M)


def steps_of(run: Path) -> list[dict]:
    """Whole lines of the metrics so far, without what depends on the clock. All that is there must
    be explained in docs/metrics.md: every test of a loop asserts that, too."""
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    lines = [json.loads(line) for line in whole.splitlines()]
    missing = unexplained({key for line in lines for key in line})
    assert not missing, f"docs/metrics.md does not explain {missing}"
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def unexplained(keys: Iterable[str]) -> list[str]:
    """Those that docs/metrics.md has no row for."""
    named = {re.sub(r"^stale/age_\d+$", "stale/age_N", key) for key in keys}
    return sorted(named - {"phase", "step", *METRICS})
