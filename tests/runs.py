"""What a run folder holds, for tests that compare two runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import jax

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


class Compilations:
    """How many programs XLA has compiled by each update of a loop that calls `note` after it."""

    def __init__(self) -> None:
        self.total = 0
        self.by_step: list[int] = []

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_: object) -> None:
        self.total += event == "/jax/core/compile/backend_compile_duration"

    def note(self, *_: object) -> None:
        """An update is done."""
        self.by_step.append(self.total)

    def after(self, step: int) -> int:
        """Programs compiled later than the update of that number, counted from 1; there must be
        later ones, and some by then."""
        assert len(self.by_step) > step and self.by_step[step - 1] > 0
        return self.by_step[-1] - self.by_step[step - 1]
