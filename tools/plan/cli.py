"""`remend plan CONFIG`: what an update of a run costs on a TPU slice that is not here.

The programs of training are compiled for the slice, and memory, FLOPs, collectives and the time
that they take at best are read from what comes out. Exit code 0: it fits, 1: it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """Plan; print a table, or one JSON object."""
    args = _parse(argv)
    from configs.files import write_atomic
    from tools.plan.cache import versions
    from tools.plan.job import read_job

    job = read_job(
        args.config, args.overrides, topology=args.topology, stage=args.stage, search=args.search
    )
    if args.search:
        from tools.plan.search import search

        plan = search(job, args.compile, _say)
    else:
        plan = _plan(job)
    plan = {"config": str(args.config), "overrides": args.overrides, **plan, "versions": versions()}
    path = (args.out or _folder(args.config, plan)) / "plan.json"
    write_atomic(path, json.dumps(plan, indent=1) + "\n")
    if args.json:
        print(json.dumps(plan | {"path": str(path)}))
    else:
        _print(plan, path)
    return 0 if plan["fits"] else 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="remend plan", description=__doc__)
    add = parser.add_argument
    add("config", type=Path)
    add("overrides", nargs="*", metavar="key=value")
    add("--topology", metavar="T", help="v5p-128, v6e:16x16, 2xv6e-256, …; default: the config's")
    add("--for", dest="stage", choices=("sft", "rl"), help="default: rl if the config sets any")
    add("--search", action="store_true", help="try meshes, remat and microbatches; take the best")
    add("--compile", type=int, default=3, metavar="N", help="of a search, the best N by formula")
    add("--out", type=Path, metavar="DIR", help="where plan.json goes; default: the cache")
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_intermixed_args(argv)


def _plan(job: Any) -> dict[str, Any]:
    """The summary of one job, and where it does not fit the nearest that does."""
    from tools.plan.costs import by_formula, compiled
    from tools.plan.nearest import nearest
    from tools.plan.search import places
    from tools.plan.summary import summary

    costs = compiled(job, _say)
    plan = summary(costs, by_formula(job, places(job.slice)(job.mesh)))
    if not costs.fits:
        plan["nearest"] = nearest(costs, _say)
    return plan


def _folder(config: Path, plan: dict[str, Any]) -> Path:
    from configs.paths import cache_dir

    return cache_dir() / "plan" / f"{config.stem}-{plan['stage']}-{plan['topology']}"


def _print(plan: dict[str, Any], path: Path) -> None:
    from rich.console import Console

    from tools.plan.table import show

    console = Console()
    show(plan, console)
    console.print(f"written to {path}", style="dim", soft_wrap=True)


def _say(line: str) -> None:
    print(f"plan: {line}", file=sys.stderr, flush=True)
