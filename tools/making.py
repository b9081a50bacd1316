"""`remend tasks mutate`: procedural bugs in the pinned packages, or in those of the mining list."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import append_jsonl, write_atomic, write_jsonl
from sandbox.base import SandboxBroken
from sandbox.candidates import CANDIDATES, Candidate, read_candidates
from sandbox.generate import Plan, TooSlow, fingerprints, generate
from sandbox.local import LocalPool
from sandbox.package_index import IndexUnreachable, PackageIndex, pip_settings
from sandbox.packages import Package, fetch, load_packages
from sandbox.pins import prepare
from sandbox.shipped import Made, Row
from sandbox.task_index import read_index
from tools.fetching import fetch_all
from tools.progress import progress

NEWEST = 3  # releases of a package tried, until one can be used
PINNED, LISTED = "pinned", "candidates"


def add_mutate(verbs: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser = verbs.add_parser("mutate", help="make tasks by mutating tested functions")
    parser.add_argument("--out", type=Path, required=True, help="folder for tasks.jsonl")
    parser.add_argument(
        "--packages-from",
        default=PINNED,
        metavar="LIST",
        help=f"{PINNED} (the default), {LISTED} (those that are mined), or a file like the latter",
    )
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="default: all of the list")
    parser.add_argument("--per-function", type=int, default=Plan.per_function, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N tasks of each package")
    parser.add_argument(
        "--count", type=int, metavar="N", help="begin no package after N tasks in all"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="packages at a time")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    plan = Plan(per_function=options.per_function, seed=options.seed)
    if options.limit is not None:
        plan = replace(plan, per_package=dict.fromkeys(plan.per_package, options.limit))
    if options.packages_from == PINNED:
        every = load_packages()
        _known(options, list(every))
        fetch_all(list(every.values()))
        usable = list(every.values())
    else:
        usable = _listed(options)
    chosen = [p for p in usable if not options.packages or p.name in options.packages]
    # held-out code must not be trained on under another name
    heldout = fingerprints(package for package in usable if package.split == "heldout")
    foreign = {"heldout": frozenset[str](), "train": frozenset(heldout)}
    asyncio.run(_make(chosen, plan, foreign, options))
    path = options.out / "tasks.jsonl"
    counts = _merge(options.out, path)
    answer = {"index": str(path), "tasks": sum(counts["split"].values()), **counts}
    print(json.dumps(answer) if options.json else table(counts))
    return 0


def table(counts: dict[str, dict[str, int]]) -> str:
    """Counts under the names of what is counted."""
    lines = []
    for name, values in counts.items():
        lines.append(f"{name} ({sum(values.values())})")
        lines += [f"  {key:<16} {value:>5}" for key, value in values.items()]
    return "\n".join(lines)


def _known(options: argparse.Namespace, names: Sequence[str]) -> None:
    for name in options.packages or ():
        if name not in names:
            raise InputError(f"no package {name!r}; there are {', '.join(names)}")


# -- the packages of a mining list


def _listed(options: argparse.Namespace) -> list[Package]:
    """The chosen packages of the list that can be used, and every held-out one.

    What was found of each is kept in the folder `found`, so that a second start asks no index.
    """
    path = CANDIDATES if options.packages_from == LISTED else Path(options.packages_from)
    if not path.is_file():
        raise InputError(f"{path}: no such list ({PINNED}, {LISTED}, or a file)")
    candidates = read_candidates(path)
    _known(options, [candidate.name for candidate in candidates])
    wanted = [
        c
        for c in candidates
        if not options.packages or c.name in options.packages or c.split == "heldout"
    ]
    found: list[Package] = []
    index = PackageIndex(pip_settings())
    with progress("packages") as report:
        for done, candidate in enumerate(wanted, start=1):
            package = _find(candidate, index, options.out)
            if package is not None:
                found.append(package)
            report(done, len(wanted), candidate.name if package else f"{candidate.name}: refused")
    if not any(not options.packages or p.name in options.packages for p in found):
        raise InputError(f"no package can be used; {options.out / 'found'} says why")
    return found


def _find(candidate: Candidate, index: PackageIndex, out: Path) -> Package | None:
    """The newest release that can be used, in the cache and ready for tests; None if none can."""
    if pinned := load_packages().get(candidate.name):  # somebody has described it by hand
        fetch([pinned])
        return pinned
    stamp = hashlib.sha256(repr(candidate).encode()).hexdigest()[:8]
    place = out / "found" / f"{candidate.name}-{stamp}.json"
    if place.is_file():
        record = json.loads(place.read_text())
        package = _from_record(record["package"]) if record["package"] else None
        if package is not None:
            fetch([package])
        return package
    package, refused = None, {}
    for dated in candidate.releases[: -NEWEST - 1 : -1]:
        try:
            package = prepare(candidate, dated, index)
            break
        except IndexUnreachable:
            raise
        except InputError as error:
            refused[dated.version] = str(error)[:300]
    record = {"package": asdict(package) if package else None, "refused": refused}
    write_atomic(place, json.dumps(record) + "\n")
    return package


def _from_record(record: dict[str, Any]) -> Package:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Package(**values)


# -- making


async def _make(
    packages: Sequence[Package],
    plan: Plan,
    foreign: dict[str, frozenset[str]],
    options: argparse.Namespace,
) -> None:
    """One file for each package, so that an interrupted run goes on where it was."""
    folder = options.out / "packages"
    places = {p.name: folder / f"{p.name}-{_stamp(plan, p)}.jsonl" for p in packages}
    waiting = [package for package in packages if not places[package.name].exists()]
    total = len(_rows(folder))
    began, old, done = time.monotonic(), total, len(packages) - len(waiting)
    queue = iter(waiting)
    async with LocalPool(options.jobs, backend=options.backend) as pool:
        with progress("tasks") as report:

            def tell(name: str) -> None:
                rate = (total - old) / max(time.monotonic() - began, 1e-9)
                report(done, len(packages), f"{total} tasks; {rate:.2f}/s; {name}")

            async def work() -> None:
                nonlocal total, done
                for package in queue:
                    if options.count is not None and total >= options.count:
                        return
                    whole = places[package.name]
                    part, refused = whole.with_suffix(".part"), whole.with_suffix(".refused")
                    write_atomic(part, "")
                    try:
                        async for row in generate(package, plan, pool, foreign[package.split]):
                            append_jsonl(part, _line(row, package).record())
                            total += 1
                            tell(package.name)
                    except (InputError, SandboxBroken, RecursionError) as error:
                        if options.packages_from == PINNED and not isinstance(error, TooSlow):
                            raise
                        write_atomic(refused, f"{error}\n")
                    part.rename(whole)
                    done += 1
                    _merge(options.out, options.out / "tasks.jsonl")
                    tell(package.name)

            async with asyncio.TaskGroup() as group:
                for _ in range(options.jobs):
                    group.create_task(work())


def _stamp(plan: Plan, package: Package) -> str:
    return hashlib.sha256(repr((plan, package)).encode()).hexdigest()[:8]


def _line(row: Row, package: Package) -> Row:
    """The line of a pinned package names it; that of any other says all about its release."""
    if load_packages().get(package.name) == package:
        return row
    return Made(
        **asdict(row),
        source="procedural",
        sdist_sha256=package.sha256,
        licence=package.licence,
        package_source=list(package.source),
        tests=list(package.tests),
        python_path=list(package.python_path),
        requirements=list(package.requirements),
    )


def _rows(folder: Path) -> list[Row]:
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        rows += [line for line in read_index(file) if isinstance(line, Row)]
    return rows


def _merge(out: Path, path: Path) -> dict[str, dict[str, int]]:
    """Join the packages' files; the order is that of hashes, so that any start is a fair sample."""
    rows = sorted(_rows(out / "packages"), key=lambda row: row.sha256)
    write_jsonl(path, [row.record() for row in rows])
    return {
        "split": dict(Counter(row.split for row in rows)),
        "package": dict(Counter(row.package for row in rows).most_common()),
        "operator": dict(Counter(row.operator for row in rows).most_common()),
    }
