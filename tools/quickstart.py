"""`remend quickstart`: the whole loop on one machine, from real packages to a report."""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from configs.schema import load
from sandbox.agreement import agreement

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    """Run every stage that is not done yet; write `summary.json` and `report.html`."""
    parser = argparse.ArgumentParser(prog="remend quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, help="run folder (runs/quickstart-seedN)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--json", action="store_true", help="print summary.json on stdout")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, got {args.seed}")
    run = args.out or Path("runs") / f"quickstart-seed{args.seed}"

    from tools.run_config import RunConfig

    config = load(RunConfig, args.config, args.overrides)
    summary = asyncio.run(_quickstart(config, run, args.seed))
    if args.json:
        print(json.dumps(summary))
    else:
        _print(summary, run)
    return 0


async def _quickstart(config: Any, run: Path, seed: int) -> dict[str, Any]:
    from rl.evaluate import breakdown, paired_gain, per_task, success
    from rl.report import write_report
    from tools.pipeline import Pipeline

    began = time.monotonic()
    pipeline = Pipeline(config, run, seed)
    clock = _Clock(run)
    clock.add("tasks", time.monotonic() - began)
    async with pipeline:
        evaluated = {}
        with clock.phase("teacher"):
            taught = await pipeline.teach()
        with clock.phase("controls"):
            evaluated["noop"] = await pipeline.evaluate("noop")
            evaluated["teacher"] = await pipeline.evaluate("teacher")
        with clock.phase("sft"):
            tuned = await pipeline.sft(taught)
        with clock.phase("eval-sft"):
            evaluated["sft"] = await pipeline.evaluate("sft", tuned)
        with clock.phase("rl"):
            trained = await pipeline.rl(tuned, taught)
        with clock.phase("eval-rl"):
            evaluated["rl"] = await pipeline.evaluate("rl", trained)
        isolation = pipeline.pool.backend
    rates = {name: per_task(done) for name, done in evaluated.items()}
    summary = {
        "seed": seed,
        "tries": config.eval.tries,
        "success": {name: success(done) for name, done in evaluated.items()},
        "gain": paired_gain(rates["sft"], rates["rl"]),
        "teacher_train": success(taught),
        "per_operator": breakdown(evaluated, "operator"),
        "per_package": breakdown(evaluated, "package"),
        "environment": config.environment,
        "isolation": isolation,
        "phases": clock.phases,
        "wall_s": round(sum(clock.phases.values()), 1),
        "peak_rss_gib": round(_peak_rss_gib(), 2),
        "report": str(run / "report.html"),
    }
    if config.judge_both:
        summary["agreement"] = {
            name: agreement(episode.verdicts for episode in done)
            for name, done in evaluated.items()
        }
    write_atomic(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_report(run)
    return summary


def _peak_rss_gib() -> float:
    """Peak memory of this process and, at most as much again each, of its largest child (KiB)."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + child) / 2**20


class _Clock:
    """Seconds spent in each phase, over all starts of a run that was interrupted."""

    def __init__(self, run: Path) -> None:
        self._path = run / "phases.json"
        self.phases: dict[str, float] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )

    def phase(self, name: str) -> _Phase:
        return _Phase(self, name)

    def add(self, name: str, seconds: float) -> None:
        self.phases[name] = round(self.phases.get(name, 0.0) + seconds, 1)
        write_atomic(self._path, json.dumps(self.phases))


class _Phase:
    def __init__(self, clock: _Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._clock.add(self._name, time.monotonic() - self._began)


def _print(summary: dict[str, Any], run: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out success (95 % interval)")
    for column in ("policy", "success", "interval", "tasks", "episodes"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    names = {"noop": "no-op", "teacher": "teacher", "sft": "SFT", "rl": "SFT + RL"}
    for key, name in names.items():
        row = summary["success"][key]
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        mean = f"{100 * row['mean']:.1f} %"
        table.add_row(name, mean, interval, str(row["n"]), str(row["episodes"]))
    console = Console(file=sys.stdout)
    console.print(table)
    gain = summary["gain"]
    console.print(
        f"RL gain over SFT, paired: {100 * gain['mean']:+.1f} points "
        f"({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    )
    console.print(f"{summary['wall_s'] / 60:.1f} min, peak memory {summary['peak_rss_gib']} GiB")
    console.print(f"report: {(run / 'report.html').absolute()}", soft_wrap=True)
