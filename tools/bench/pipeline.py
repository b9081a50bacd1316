"""`remend bench pipeline`: SFT's input beside the training that it feeds, on the same cores.

Input is all that lies between a file of episodes and the arrays of an update: reading, checking,
filters, weights, the plan of the rows, and the rows themselves, of one epoch. Training is the
shipped policy on just these rows. Rounds visit both in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from model.folder import load_policy
from model.share import Share
from model.tokenizer import Tokenizer
from sft.batches import ahead, input_of
from sft.examples import Examples
from sft.filling import fewest_rows, use
from sft.learner import Learner, OptimizerConfig, nll
from sft.trajectory import ENVIRONMENT, POLICY, Stored, Trajectory, Turn, save
from tools.progress import progress
from tools.run_config import POLICIES

INPUT, PACKING, TRAINING = "input", "packing", "training"


@dataclass(frozen=True)
class _Shape:
    """Of rows and updates, as the fields of SFTConfig."""

    row_tokens: int
    row_targets: int
    batch_rows: int
    microbatch_rows: int


def main(argv: list[str]) -> int:
    """Measure and print. 0, whatever the ratio."""
    options = _parse(argv)
    shape = _Shape(options.row_tokens, options.row_targets, options.batch_rows, options.microbatch)
    policy = load_policy(POLICIES / "tiny")
    with tempfile.TemporaryDirectory(prefix="remend-bench-") as temporary:
        path = options.trajectories or Path(temporary) / "episodes.jsonl"
        if options.trajectories is None:
            save(path, _episodes(policy.tokenizer, options.episodes))
        found = _measure(path, policy, shape, options)
    print(json.dumps(found)) if options.json else _print(found)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="remend bench pipeline", description=__doc__)
    add = parser.add_argument
    add("--trajectories", type=Path, metavar="FILE", help="of a run, in place of made-up ones")
    add("--episodes", type=int, default=400, help="made-up ones, of log-normal lengths")
    add("--rounds", type=int, default=5)
    add("--updates", type=int, default=3, help="that are trained in a round")
    add("--row-tokens", type=int, default=2048)
    add("--row-targets", type=int, default=1024)
    add("--batch-rows", type=int, default=4)
    add("--microbatch", type=int, default=2, help="rows of a microbatch")
    add("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)
    for name in ("episodes", "rounds", "updates", "row_tokens", "batch_rows", "microbatch"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if options.row_targets < 0:
        raise InputError("--row-targets may not be below 0; 0: a slot for every token")
    if options.trajectories is not None and not options.trajectories.is_file():
        raise InputError(f"--trajectories: there is no file {options.trajectories}")
    return options


def _episodes(tokenizer: Tokenizer, count: int) -> list[Trajectory]:
    """Made-up episodes of about 400 tokens, 4 turns and 18 % with loss, as a teacher's are."""
    rng = np.random.default_rng(0)
    highest = tokenizer.vocab_size

    def some(n: int) -> list[int]:
        return rng.integers(0, highest, n).tolist()

    made = []
    for number in range(count):
        size = int(np.clip(rng.lognormal(np.log(400), 0.35), 64, 1024))
        verdict = {"verdict": "pass"}
        one = Trajectory(
            *(f"task-{number}", "package", "operator", "train", "teacher", number, -1, ""),
            verdict=verdict,
        )
        one.add(some(size // 3), ENVIRONMENT)
        one.prompt = tokenizer.decode(one.ids)
        for _ in range(4):
            written, seen = some(max(size // 22, 1)), some(size // 9)
            one.add(written, POLICY)
            one.add(seen, ENVIRONMENT)
            call = {"name": "view", "arguments": {"line": 1}}
            one.turns.append(Turn(tokenizer.decode(written), [call], [tokenizer.decode(seen)]))
        made.append(one)
    return made


def _measure(path: Path, policy: Any, shape: _Shape, options: argparse.Namespace) -> dict[str, Any]:
    learner = Learner(policy.config, OptimizerConfig(warmup_steps=0).build(1000), nll)
    state = learner.init(policy.params)
    speeds: dict[str, list[float]] = {INPUT: [], PACKING: [], TRAINING: []}
    facts: dict[str, Any] = {}
    with progress("bench pipeline") as report:
        for number in range(options.rounds + 1):
            began = time.perf_counter()
            examples = Examples(Stored(path))
            if not examples:
                raise InputError(f"{path} holds no verified episode")
            sizes, planned = examples.sizes, time.perf_counter()
            plan = fewest_rows(sizes, shape.row_tokens, shape.row_targets)
            packing = time.perf_counter() - planned
            batches = _epoch(examples, plan, shape)
            seconds, tokens = time.perf_counter() - began, sum(n for n, _ in sizes)
            some = batches[: options.updates]
            trained = sum(int((rows.segments > 0).sum()) for batch in some for rows in batch)
            began = time.perf_counter()
            for batch in some:
                state, _ = learner.step(state, batch)
            spent = time.perf_counter() - began
            if number:  # the first round compiles
                speeds[INPUT].append(tokens / seconds)
                speeds[PACKING].append(tokens / max(packing, 1e-9))
                speeds[TRAINING].append(trained / spent)
            facts = {"episodes": len(examples), "tokens": tokens, "packed_rows": len(plan)}
            facts["token_use"] = use(plan, sizes, shape.row_tokens)
            report(number + 1, options.rounds + 1, "")
    reference = statistics.median(speeds[TRAINING])
    return {
        "rows": [_row(name, values, reference) for name, values in speeds.items()],
        "ratio": "the row's tokens/s over training's",
        **facts,
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "trajectories")},
        "cores": len(os.sched_getaffinity(0)),
    }


def _epoch(examples: Examples, plan: Any, shape: _Shape) -> list[Any]:
    """All updates of one epoch, through the iterator that training has."""
    order = np.random.default_rng(0).permutation(len(plan))
    starts = range(0, len(order), shape.batch_rows)
    dataset = input_of(
        examples,
        plan,
        [order[i : i + shape.batch_rows] for i in starts],
        shape.microbatch_rows,
        Share(),
        shape.row_tokens,
        shape.row_targets,
    )
    with contextlib.closing(ahead(dataset, 0)) as batches:
        return list(batches)


def _row(name: str, values: Sequence[float], reference: float) -> dict[str, Any]:
    low, value, high = np.percentile(values, [25, 50, 75]).tolist()
    ratio = value / reference
    return {"name": name, "measure": "tokens_per_s", "value": value, "low": low, "high": high} | {
        "ratio": ratio
    }


def _print(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "tokens / s", "quartiles", "÷ training"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in found["rows"]:
        between = f"{row['low']:.0f}–{row['high']:.0f}"
        table.add_row(row["name"], f"{row['value']:.0f}", between, f"{row['ratio']:.1f}")
    console.print(table)
    console.print(
        f"{found['episodes']} episodes of {found['tokens']} tokens in {found['packed_rows']} rows, "
        f"of which they take {found['token_use']:.1%}; on {found['cores']} cores",
        style="dim",
    )
