"""`remend bench model`: train step, log-probabilities and sampling, beside named peers.

Every peer loads the same checkpoint, then trains on, scores or samples behind the same ids, on the
same cores and in float32. A process does one measure of one peer; rounds visit all peers in turn.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.errors import InputError
from configs.schema import to_dict
from tools.bench.checkpoint import CHECKPOINT, INPUTS, write
from tools.bench.compare import Row, reference, rows
from tools.bench.install import install
from tools.bench.peer import PEERS, Worker, default_pythons, parse_peer
from tools.bench.rounds import Track, measure
from tools.bench.settings import MEASURES, ModelBench, settings
from tools.bench.table import show
from tools.progress import progress

Measured = Mapping[str, Mapping[str, Track]]  # tracks by measure, then peer


def main(argv: list[str]) -> int:
    """Measure and print. 0 if every peer that has an interpreter could be measured, else 1."""
    options = _parse(argv)
    bench = settings(options.overrides, options.preset)
    cores = _cores(options.cores)
    pythons = _pythons(options)
    measures = [m for m in MEASURES if not options.measure or m in options.measure]
    measured, failed = _measure(bench, measures, pythons, cores, options.device)
    found = rows(measured, {name: bench.tokens_of(name) for name in measured})
    if options.json:
        facts = _facts(bench, measured, cores, options.device)
        print(json.dumps({"rows": [asdict(row) for row in found], "failed": failed, **facts}))
    else:
        _print(found, measured, cores)
    return 1 if failed else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="remend bench model", description=__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="of tools/bench/model.yaml")
    add("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter")
    add("--install", type=Path, metavar="DIR", help="the peers' environments, made where missing")
    add("--python312", type=Path, metavar="PYTHON", help="to make MaxText's environment with")
    add("--only", action="append", choices=PEERS, help="measure this peer (again for more)")
    add("--measure", action="append", choices=MEASURES, help="measure this (again for more)")
    add("--preset", metavar="NAME", help="network of a preset, in place of `model`")
    add("--cores", type=int, metavar="N", help="cores for every peer (default: all)")
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_intermixed_args(argv)


def _pythons(options: argparse.Namespace) -> dict[str, Path]:
    """Interpreters of the peers to measure, in the order of PEERS; says which are left out."""
    wanted = [name for name in PEERS if not options.only or name in options.only]
    named = dict(parse_peer(text) for text in options.peer)
    found = default_pythons()
    if options.install is not None:
        needed = [name for name in wanted if name not in named]
        found |= install(options.install, needed, options.python312, _say)
    found |= named
    for name in wanted:
        if name not in found:
            _say(f"{name} is left out; to have it: --peer {name}=PYTHON or --install DIR")
    return {name: found[name] for name in wanted if name in found}


def _cores(count: int | None) -> list[int]:
    """The first `count` of the cores that this process may use."""
    there = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(there):
        raise InputError(f"--cores {count}: this process may use 1 to {len(there)}")
    return there[:count]


def _measure(
    bench: ModelBench,
    measures: Sequence[str],
    pythons: Mapping[str, Path],
    cores: Sequence[int],
    device: str,
) -> tuple[Measured, dict[str, str]]:
    """Tracks, and for each "peer, measure" that failed the line that says why."""
    measured: dict[str, dict[str, Track]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="remend-bench-") as temporary:
        folder = Path(temporary)
        # not in this process, which then starts no thread that could disturb a measurement
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as aside:
            aside.submit(write, folder, bench).result()
        for what in measures:
            job = _job(bench, what, folder) | {"threads": len(cores), "device": device}
            measured[what], broken = _rounds(bench, job, pythons, cores, folder)
            for name, why in broken.items():
                failed[f"{name}, {what}"] = why
                _say(f"{name} could not be measured ({what}): {why}")
    return measured, failed


def _job(bench: ModelBench, what: str, folder: Path) -> dict[str, Any]:
    """What a worker is told about the work, see `peers/worker.py`."""
    shapes = ("rows", "tokens", "slots", "prompt", "new", "learning_rate", "weight_decay")
    return {
        "measure": what,
        "checkpoint": str(folder / CHECKPOINT),
        "inputs": str(folder / INPUTS),
        **{name: getattr(bench, name) for name in shapes},
    }


def _rounds(
    bench: ModelBench,
    job: dict[str, Any],
    pythons: Mapping[str, Path],
    cores: Sequence[int],
    folder: Path,
) -> tuple[dict[str, Track], dict[str, str]]:
    """One measure of all peers, with a bar on stderr."""
    starts = {
        name: functools.partial(Worker, name, python, job, cores, folder / f"{name}.log")
        for name, python in pythons.items()
    }
    total, done = len(starts) * (1 + bench.warmup + bench.repetitions), itertools.count(1)
    with progress(f"bench {job['measure']}") as report:
        return measure(
            starts, bench.warmup, bench.repetitions, lambda name: report(next(done), total, name)
        )


def _facts(
    bench: ModelBench, measured: Measured, cores: Sequence[int], device: str
) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "ratio": "remend's tokens/s over the row's",
        "reference": {what: reference(tracks) for what, tracks in measured.items()},
        "versions": _versions(measured),
        "cores": len(cores),
        "device": device,
        "settings": to_dict(bench),
    }


def _print(found: Sequence[Row], measured: Measured, cores: Sequence[int]) -> None:
    console = Console()
    show(found, console)
    for name, packages in _versions(measured).items():
        console.print(f"{name}: {', '.join(f'{p} {v}' for p, v in packages.items())}", style="dim")
    console.print(f"on {len(cores)} cores", style="dim")


def _versions(measured: Measured) -> dict[str, dict[str, str]]:
    """By peer, the versions of its packages."""
    return {name: t.versions for tracks in measured.values() for name, t in tracks.items()}


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)
