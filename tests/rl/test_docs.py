"""docs/rl.md: every row is a config that loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.schema import load
from tools.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(r"^\| ([^|]+) \| `(rl\.[^`]+)` \|$", (ROOT / "docs" / "rl.md").read_text(), re.M)


@pytest.mark.parametrize(("method", "keys"), ROWS)
def test_a_method_is_a_config(method: str, keys: str) -> None:
    # the quickstart's own credit for turns goes with neither a critic nor whole sequences
    overrides = ["rl.turn_credit=0", *keys.replace("TOKENS", "96").split()]
    load(RunConfig, ROOT / "configs" / "quickstart.yaml", overrides)


def test_there_are_rows() -> None:
    assert len(ROWS) >= 12
