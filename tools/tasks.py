"""`remend tasks`: make repair tasks, prove them, judge a patch, and count what there is."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from configs.errors import InputError
from configs.files import append_jsonl, write_atomic, write_jsonl
from sandbox.generate import Plan, fingerprints, generate
from sandbox.local import LocalPool
from sandbox.packages import Package, Release, fetch, load_packages
from sandbox.shipped import read_rows
from sandbox.task import Task, load_tasks
from sandbox.task_index import NAMED, in_build_order, make, read_index, releases_of, source_of
from sandbox.verdict import judge
from sandbox.verify import Check, verify
from tools.mining import add_mine
from tools.progress import progress

BACKENDS = ("auto", "bwrap", "plain")


def main(argv: list[str]) -> int:
    """Run `remend tasks {mine,mutate,verify,judge,rebuild,stats}`."""
    parser = argparse.ArgumentParser(prog="remend tasks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    names = ", ".join(NAMED)

    making = verbs.add_parser("mutate", help="make tasks by mutating tested functions")
    making.add_argument("--out", type=Path, required=True, help="folder for tasks.jsonl")
    making.add_argument("--packages", nargs="+", metavar="NAME", help="default: all")
    making.add_argument("--per-function", type=int, default=Plan.per_function, metavar="N")
    making.add_argument("--limit", type=int, metavar="N", help="at most N tasks of each package")
    making.add_argument("--seed", type=int, default=Plan.seed)
    making.set_defaults(run=_mutate)

    mining = add_mine(verbs)

    proving = verbs.add_parser("verify", help="no-op must fail, the known fix must pass")
    proving.add_argument("--index", default="shipped", help=f"{names}, a .jsonl file, or a folder")
    proving.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each control")
    proving.add_argument("--limit", type=int, metavar="N")
    proving.add_argument("--split", choices=("train", "heldout"))
    proving.add_argument("--keep", type=Path, metavar="FILE", help="write the sound lines here")
    proving.add_argument("--seed", type=int, default=0, help="of the tests' random orders")
    proving.add_argument("--jobs", type=int, default=1, metavar="N", help="sandboxes at a time")
    proving.set_defaults(run=_verify)

    judging = verbs.add_parser("judge", help="the verdict on a unified diff, in the clean room")
    judging.add_argument("task", help="task directory, or name of a shipped task")
    judging.add_argument("patch", help="file with a unified diff against the buggy tree, or -")
    judging.set_defaults(run=_judge)

    building = verbs.add_parser("rebuild", help="write an index's tasks as Harbor directories")
    building.add_argument("--out", type=Path, required=True)
    building.add_argument("--index", default="shipped", help=f"{names}, or a .jsonl file")
    building.add_argument("--limit", type=int, metavar="N")
    building.set_defaults(run=_rebuild)

    counting = verbs.add_parser("stats", help="counts by source, split, package and operator")
    counting.add_argument("--index", default="all", help=f"{names}, a .jsonl file, or a folder")
    counting.set_defaults(run=_stats)

    for verb in (making, mining, proving, judging, building, counting):
        verb.add_argument("--json", action="store_true", help="one JSON object on stdout")
    for verb in (making, mining, proving, judging):
        verb.add_argument("--backend", choices=BACKENDS, default="auto", help="of the sandbox")
    options = parser.parse_args(argv)
    for name in ("limit", "repeat", "jobs", "per_function", "newest"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return options.run(options)


# -- mutate


def _mutate(options: argparse.Namespace) -> int:
    packages = load_packages()
    for name in options.packages or ():
        if name not in packages:
            raise InputError(f"no package {name!r}; there are {', '.join(packages)}")
    chosen = [packages[name] for name in options.packages or packages]
    plan = Plan(per_function=options.per_function, seed=options.seed)
    if options.limit is not None:
        plan = replace(plan, per_package=dict.fromkeys(plan.per_package, options.limit))
    _fetch(list(packages.values()))
    heldout = [package for package in packages.values() if package.split == "heldout"]
    # held-out code must not be trained on under another name
    foreign = {"heldout": frozenset[str](), "train": frozenset(fingerprints(heldout))}
    asyncio.run(_make(chosen, plan, foreign, options))
    path = options.out / "tasks.jsonl"
    counts = _merge(options.out, path)
    _answer(options.json, {"index": str(path), **counts}, _table(counts))
    return 0


async def _make(
    packages: Sequence[Package],
    plan: Plan,
    foreign: dict[str, frozenset[str]],
    options: argparse.Namespace,
) -> None:
    """One file for each package, so that an interrupted run goes on where it was."""
    async with LocalPool(1, backend=options.backend) as pool:
        with progress("tasks") as report:
            total = 0
            for done, package in enumerate(packages):
                report(done, len(packages), f"{total} tasks; {package.name}")
                stamp = hashlib.sha256(repr((plan, package)).encode()).hexdigest()[:8]
                whole = options.out / "packages" / f"{package.name}-{stamp}.jsonl"
                part = whole.with_suffix(".part")
                if not whole.exists():
                    part.unlink(missing_ok=True)
                    write_atomic(part, "")
                    async for row in generate(package, plan, pool, foreign[package.split]):
                        append_jsonl(part, row.record())
                        total += 1
                        report(done, len(packages), f"{total} tasks; {package.name}")
                    part.rename(whole)
                _merge(options.out, options.out / "tasks.jsonl")
            report(len(packages), len(packages), f"{total} new tasks")


def _merge(folder: Path, path: Path) -> dict[str, dict[str, int]]:
    """Join the packages' files; the order is that of hashes, so that any start is a fair sample."""
    rows = [
        row for file in sorted((folder / "packages").glob("*.jsonl")) for row in read_rows(file)
    ]
    rows.sort(key=lambda row: row.sha256)
    write_jsonl(path, [row.record() for row in rows])
    return {
        "split": dict(Counter(row.split for row in rows)),
        "package": dict(Counter(row.package for row in rows).most_common()),
        "operator": dict(Counter(row.operator for row in rows).most_common()),
    }


# -- verify


def _verify(options: argparse.Namespace) -> int:
    tasks = _load(options.index, options.split, options.limit)
    if not tasks:
        raise InputError(f"no tasks to verify in {options.index}")
    checks = asyncio.run(_verify_all(tasks, options))
    good = sum(check.flips for check in checks)
    if options.keep is not None:
        sound = {check.task for check in checks if check.flips}
        lines = read_index(options.index)
        write_jsonl(options.keep, [line.record() for line in lines if line.name in sound])
    answer = {
        "tasks": [asdict(check) for check in checks],
        "verified": good,
        "failed": len(checks) - good,
        "repeat": options.repeat,
        "verdicts": sum(check.runs for check in checks),
    }
    told = [
        f"{check.task}: before {check.before}, after {check.after}"
        for check in checks
        if not check.flips
    ]
    told.append(f"{good} of {len(checks)} tasks fail before and pass after, {options.repeat}x")
    _answer(options.json, answer, "\n".join(told))
    return 0 if good == len(checks) else 1


async def _verify_all(tasks: Sequence[Task], options: argparse.Namespace) -> list[Check]:
    room = asyncio.Semaphore(options.jobs)
    async with LocalPool(options.jobs, backend=options.backend) as pool:
        with progress("verify") as report:
            done = 0

            async def one(task: Task) -> Check:
                nonlocal done
                async with room:
                    check = await verify(task, pool, options.repeat, options.seed)
                done += 1
                report(done, len(tasks), task.name)
                return check

            return await asyncio.gather(*map(one, tasks))


# -- judge


def _judge(options: argparse.Namespace) -> int:
    task = _find(options.task)
    try:
        raw = sys.stdin.buffer.read() if options.patch == "-" else Path(options.patch).read_bytes()
        patch = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the patch {options.patch}: {error}") from None

    async def run() -> dict:
        async with LocalPool(1, backend=options.backend) as pool:
            return asdict(await judge(task, patch, pool))

    verdict = asyncio.run(run())
    flags = f" ({', '.join(verdict['flags'])})" if verdict["flags"] else ""
    failed = [
        f"{id}: {outcome}"
        for id, outcome in (verdict["fail_to_pass"] | verdict["pass_to_pass"]).items()
        if outcome != "passed"
    ]
    _answer(options.json, verdict, "\n".join([*failed, verdict["verdict"] + flags]))
    return 0 if verdict["verdict"] == "pass" else 1


def _find(name: str) -> Task:
    """A task by its directory, or by its name in the shipped index."""
    if "/" in name or Path(name).is_dir():
        return Task.load(Path(name))
    for row in read_index("all"):
        if row.name == name:
            _fetch(releases_of([row]))
            return make(row)
    raise InputError(f"{name}: neither a task directory nor a shipped task (see tasks stats)")


# -- rebuild


def _rebuild(options: argparse.Namespace) -> int:
    """Make every task of the index again; `build` compares each with its recorded hash."""
    rows = read_index(options.index)[: options.limit]
    _fetch(releases_of(rows))
    digests: dict[str, str] = {}
    with progress("rebuild") as report:
        for row in in_build_order(rows):
            folder = options.out / row.name
            if folder.exists():
                raise InputError(f"{folder} exists already: choose another --out")
            task = make(row)
            task.save(folder)
            digests[row.name] = task.digest
            report(len(digests), len(rows), row.package)
    answer = {
        "out": str(options.out),
        "tasks": len(digests),
        "same_hash": len(digests),
        "digests": digests,
    }
    _answer(options.json, answer, f"{len(digests)} tasks in {options.out}, hashes as recorded")
    return 0


# -- stats


def _stats(options: argparse.Namespace) -> int:
    if options.index in NAMED or options.index.endswith(".jsonl"):
        rows = read_index(options.index)
        facts = [(source_of(r), r.split, r.package, r.operator) for r in rows]
    else:
        tasks = _load(options.index)
        facts = [(t.source, t.split, t.package, t.operator) for t in tasks]
    names = ("source", "split", "package", "operator")
    counts = {
        name: dict(Counter(fact[at] for fact in facts).most_common())
        for at, name in enumerate(names)
    }
    _answer(options.json, {"tasks": len(facts), **counts}, _table(counts))
    return 0


# -- shared


def _load(index: str, split: str | None = None, limit: int | None = None) -> list[Task]:
    with progress("tasks") as report:
        return load_tasks(index, split, limit, lambda done, total: report(done, total, ""))


def _fetch(packages: Sequence[Release]) -> None:
    with progress("packages") as report:
        done = 0

        def one(package: object) -> None:
            nonlocal done
            done += 1
            report(done, len(packages), "")

        fetch(packages, one)


def _table(counts: dict[str, dict[str, int]]) -> str:
    lines = []
    for name, values in counts.items():
        lines.append(f"{name} ({sum(values.values())})")
        lines += [f"  {key:<16} {value:>5}" for key, value in values.items()]
    return "\n".join(lines)


def _answer(as_json: bool, answer: dict, text: str) -> None:
    print(json.dumps(answer) if as_json else text)
