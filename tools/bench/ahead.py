"""`remend bench ahead`: GRPO with rollouts that run ahead, beside the same run in turn.

The same tasks, seeds, sandboxes, slots and number of learner steps; each side in a process of its
own, one after the other, first one then the other side first. The final policies are evaluated on
the same held-out tasks and seeds.

Episodes an hour are those of the steps behind the warm-up, and before the last ones: a run that is
ahead has rollouts of steps to come under way when the clock starts, and must have as many when it
stops, or it would be given work that was done before.

By default tests take what they take here: seconds of CPU, which two cores cannot overlap.
`--tool-s MEDIAN,P95,MOST` makes each test run wait besides, log-normally and without CPU, as tests
do that start servers, sleep, or run on other machines. Runs whose report is remembered wait as
well: the wait stands for the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.errors import InputError

SIDES = ("in turn", "ahead")
CONFIG = Path(__file__).parent / "ahead.yaml"


def main(argv: list[str]) -> int:
    """Run both sides `--rounds` times, and print rates, their ratio and final success."""
    parser = argparse.ArgumentParser(prog="remend bench ahead", description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rounds", type=int, default=2, help="of both sides")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--staleness", type=int, default=2, help="of the side that runs ahead")
    parser.add_argument(
        "--tool-s", default="", metavar="MEDIAN,P95,MOST", help="wait of a test run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if min(args.rounds, args.staleness, args.warmup) < 1:
        raise InputError("--rounds, --staleness and --warmup must be at least 1")

    from configs.schema import load
    from tools.run_config import RunConfig

    config = load(RunConfig, args.config, args.overrides)
    cut = args.warmup + args.staleness + 1
    if config.rl.steps < cut + 2:
        raise InputError(
            f"rl.steps must be at least {cut + 2}: {args.warmup} are not timed at the start "
            f"(--warmup), {args.staleness + 1} at the end (--staleness)"
        )
    wait = _wait(args.tool_s)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="remend-ahead-") as root:
        for number in range(args.rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                out = Path(root) / f"{side.replace(' ', '-')}-{number}"
                overrides = [*args.overrides, f"rl.max_staleness={args.staleness}"]
                if side == "in turn":
                    overrides = [*args.overrides, "rl.max_staleness=0", "rl.spare=0"]
                order = {
                    "config": str(args.config.absolute()),
                    "overrides": overrides,
                    "run": str(out),
                    "seed": args.seed + number,
                    "timed": [args.warmup, config.rl.steps - args.staleness - 1],
                    "wait": wait,
                }
                print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr, flush=True)
                found[side].append(_run(order))
    report = compare(found)
    report |= {"tool_s": wait, "rounds": args.rounds, "max_staleness": args.staleness}
    if args.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rates over all rounds, their ratio, and success by task with 95 % intervals.

    `found`: by side, a round's `episodes`, `seconds`, `learner_idle` and `success` by task. A
    task's success is its mean over the rounds.
    """
    import numpy as np

    from rl.evaluate import interval, paired_gain

    report: dict[str, Any] = {}
    rates, tasks = {}, {}
    for side, rounds in found.items():
        hours = sum(r["seconds"] for r in rounds) / 3600
        rates[side] = sum(r["episodes"] for r in rounds) / hours
        tasks[side] = {
            name: sum(r["success"][name] for r in rounds) / len(rounds)
            for name in rounds[0]["success"]
        }
        report[side] = {
            "episodes_per_h": rates[side],
            "of_rounds": [3600 * r["episodes"] / r["seconds"] for r in rounds],
            "learner_idle": sum(r["learner_idle"] for r in rounds) / len(rounds),
            "success": interval(np.array(list(tasks[side].values()))),
        }
    report["ratio"] = rates["ahead"] / rates["in turn"]
    report["gain"] = paired_gain(tasks["in turn"], tasks["ahead"])
    return report


def _wait(text: str) -> list[float]:
    if not text:
        return []
    from tools.simulate import Spread

    try:
        wait = [float(part) for part in text.split(",")]
        Spread(*wait)
    except (ValueError, TypeError):
        raise InputError(
            f"--tool-s wants MEDIAN,P95,MOST in seconds, each at least the one before: not {text!r}"
        ) from None
    return wait


def _run(order: dict[str, Any]) -> dict[str, Any]:
    """One side of one round, in a process that ends with it."""
    child = subprocess.run(
        [sys.executable, "-m", "tools.bench.ahead_side", json.dumps(order)],
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode:
        raise InputError(f"bench: a run ended with exit code {child.returncode}; see above")
    return dict(json.loads(child.stdout.splitlines()[-1]))


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    wait = report["tool_s"]
    what = "median {} s, 95 % below {} s, at most {} s".format(*wait) if wait else "none added"
    table = Table(title=f"wait of a test run: {what}")
    for name in ("rollouts", "episodes/h", "of each round", "learner idle", "final success"):
        table.add_column(name, justify="left" if name == "rollouts" else "right")
    for side in SIDES:
        row = report[side]
        table.add_row(
            side,
            f"{row['episodes_per_h']:.0f}",
            ", ".join(f"{rate:.0f}" for rate in row["of_rounds"]),
            f"{row['learner_idle']:.0%}",
            "{mean:.1%} ({low:.1%} to {high:.1%})".format(**row["success"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"ahead ÷ in turn: {report['ratio']:.2f} × episodes an hour; final success, paired: "
        "{mean:+.1%} ({low:+.1%} to {high:+.1%})".format(**report["gain"])
    )
