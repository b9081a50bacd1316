"""docs/metrics.md and what the loops write: no key without a row, no row without a key.

That every key has a row is asserted wherever a test reads a run's metrics (``tests/runs.py``).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rl.report_sections import MAIN_CURVES
from tests.runs import METRICS, steps_of, unexplained
from tools.watch import METRICS as WATCHED

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "".join(p.read_text() for d in ("sft", "rl") for p in sorted((ROOT / d).glob("*.py")))
# written under a name made up of parts: the learner's own, and those of a server under time/
MADE_UP = {
    **{
        f"{area}/{name}": name
        for area in ("sft", "rl", "pretrain")
        for name in ("loss", "grad_norm")
    },
    "sft/skipped": "skipped",
    "stale/age_N": 'f"stale/age_{age}"',
}
DERIVED = {"rollout/tokens_per_s", "time/rollout_share"}  # by `remend watch`, from others


def test_no_row_without_a_key() -> None:
    assert len(METRICS) == len(set(METRICS)) >= 40
    for key in METRICS:
        written = MADE_UP.get(key, key.removeprefix("time/") if key.count("/") > 1 else key)
        literal = written if written.startswith("f") and "{" in written else f'"{written}"'
        assert literal in SOURCE, f"docs/metrics.md explains {key}, which nothing writes"


def test_what_is_shown_is_there() -> None:
    """A key that `remend watch` or a report looks for under another name is never shown."""
    assert unexplained({*WATCHED, *MAIN_CURVES} - DERIVED) == []


def test_a_key_without_a_row_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase":"rl","step":1,"rl/loss":1,"stale/age_3":1}\n')
    steps_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"phase":"rl","step":1,"rl/lost":1}\n')
    with pytest.raises(AssertionError, match=re.escape("['rl/lost']")):
        steps_of(tmp_path)
