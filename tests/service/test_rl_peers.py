"""TRL and verl, run anew, answer what ``tests/rl/peers.json`` says they do.

Needs a Python with them (``rl_peers.txt``), named in REMEND_RL_PEERS_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PYTHON = os.environ.get("REMEND_RL_PEERS_PYTHON")
KEPT = Path(__file__).parents[1] / "rl" / "peers.json"

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not PYTHON, reason="REMEND_RL_PEERS_PYTHON names no Python with TRL, verl"),
]


def compare(found: Any, kept: Any, where: str) -> None:
    """Same keys; numbers to 1e-9, texts the same."""
    if isinstance(kept, dict):
        assert found.keys() == kept.keys(), where
        for key in kept:
            compare(found[key], kept[key], f"{where} / {key}")
    elif isinstance(kept, str):
        assert found == kept, f"{where}: another version? Make {KEPT.name} again"
    else:
        np.testing.assert_allclose(found, kept, rtol=1e-9, atol=1e-12, err_msg=where)


def test_the_peers_still_say_what_is_kept(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = str(Path(__file__).with_name("rl_peers.py"))
    done = subprocess.run(
        [str(PYTHON), script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compare(json.loads(done.stdout), json.loads(KEPT.read_text()), "peers.json")
