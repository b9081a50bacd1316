"""A study's folder with made-up episodes, for tests of its tables and its page."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.files import write_jsonl
from rl.episodes import read_episodes
from rl.exploitation import Outcome
from rl.study_grid import Cell, grid, row_of
from rl.study_tables import study_record
from sandbox.environments import ENVIRONMENTS

HOSTILE = "</script><img src=x onerror=document.title='owned'><!--"


def chance(cell: Cell) -> float:
    """What RL adds where it was trained is 20 points, elsewhere nothing; thinking costs 10."""
    base = {"teacher": 0.4, "base": 0.1, "sft": 0.4, "rl": 0.4}[cell.policy]
    gain = 0.2 if cell.policy == "rl" and cell.trained == cell.tested else 0.0
    return base + gain - (0.1 if cell.thinking else 0.0)


def record(task: str, policy: str, won: bool, rng: random.Random, step: int = 0) -> dict[str, Any]:
    """One episode; RL runs tests more often than SFT."""
    runs = 3 if policy == "rl" else 1
    calls = [{"name": "view", "arguments": {}}]
    calls += [{"name": "edit", "arguments": {"old": f"a < {HOSTILE}", "new": f"a > {HOSTILE}"}}]
    calls += [{"name": "run_tests", "arguments": {}}] * runs
    said = ["1 a < b", "edited", *["1 of 2 tests fail"] * runs]
    exploit = step > 0 and policy == "rl" and not won
    return {
        "task": task, "package": "pkg", "operator": "boundary", "split": "heldout",
        "policy": policy, "seed": rng.randrange(1 << 30), "weight_version": step,
        "prompt": f"Repair {task}.", "ids": [1, 2, 3], "author": [0, 1, 1],
        "logprobs": [0.0, -0.1, -0.1], "versions": [-1, step, step],
        "turns": [{"text": f"{policy} {HOSTILE}", "calls": calls, "observations": said}],
        "patch": "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n",
        "verdict": {
            "verdict": "pass" if won else "quarantine" if exploit else "fail",
            "flags": ["guard:validation-deleted:x.py"] if exploit else [],
            "fail_to_pass": {"t": "passed" if won else "failed"},
            "pass_to_pass": {"u": "passed"},
        },
        "reward": float(won), "stop": "turns", "seconds": 2.0, "sandbox_s": 0.5,
    }  # fmt: skip


def write(
    out: Path, tasks: int = 40, tries: int = 4, seeds: tuple[int, ...] = (0, 1), steps: int = 8
) -> Path:
    """A whole study in `out`, less its page."""
    cells = grid(ENVIRONMENTS, True, seeds)
    for cell in cells:
        rng = random.Random(cell.name)
        folder = out / "cells" / cell.name
        path = folder / "trajectories" / f"eval-{cell.policy}.jsonl"
        write_jsonl(
            path,
            (
                record(f"task-{n:03d}", cell.policy, rng.random() < chance(cell), rng)
                for n in range(tasks)
                for _ in range(tries)
            ),
        )
        row = row_of(cell, read_episodes(folder), 1.0)
        (folder / "cell.json").write_text(json.dumps(row))
    for environment in ENVIRONMENTS:
        lines = [{"phase": "rl", "step": k, "rl/success": k / 20} for k in range(20)]
        write_jsonl(out / "train" / f"{environment}-seed0" / "metrics.jsonl", lines)
        (out / "shift").mkdir(exist_ok=True)
        kl = {"old text": {"mean": 0.1, "low": 0.05, "high": 0.2, "share": 1.0, "tokens": 9}}
        (out / "shift" / f"{environment}-seed0.json").write_text(json.dumps({"kl": kl}))
    for guard in ("off", "on"):
        rng = random.Random(guard)
        outcomes = []
        for step in range(1, steps + 1):
            made = []
            for n in range(30):
                exploited = guard == "off" and rng.random() < step / steps
                repaired = not exploited and rng.random() < 0.4
                passed = exploited or repaired
                task = f"long-{n % 25}"
                paid = passed and (guard == "off" or not exploited)
                outcomes.append(Outcome(step, task, passed, paid, exploited, exploited, repaired))
                made.append(record(task, "rl", not exploited, rng, step))
            path = out / "exploit" / f"{guard}-seed0" / "trajectories" / f"rl-{step:06d}.jsonl"
            write_jsonl(path, made)
        write_jsonl(
            out / "exploit" / f"{guard}-seed0" / "outcomes.jsonl", [asdict(o) for o in outcomes]
        )
    found = study_record(out, cells, ENVIRONMENTS, thinks=True) | {
        "wall_s": 60.0,
        "walls": {"cell": 60.0},
    }
    (out / "study.json").write_text(json.dumps(found))
    return out
