"""`remend tasks mine`: real bugs from adjacent releases of the packages in a list."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic, write_jsonl
from sandbox.base import Limits
from sandbox.candidates import (
    CANDIDATES,
    Candidate,
    Pair,
    candidate_from,
    pairs,
    read_candidates,
    write_candidates,
)
from sandbox.layout import package_of
from sandbox.local import LocalPool
from sandbox.mine import MineLimits, PairRecord, mine_pair, tasks_of
from sandbox.package_index import IndexUnreachable, PackageIndex, pip_settings
from sandbox.packages import Package, fetch
from sandbox.pins import prepare
from tools.progress import progress

VERSION = 2  # of what a pair's record holds: another one is mined again


def add_mine(verbs: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser = verbs.add_parser("mine", help="real bugs from adjacent releases")
    parser.add_argument("--out", type=Path, help="folder for tasks.jsonl and the pairs' records")
    parser.add_argument("--list", type=Path, default=CANDIDATES, metavar="FILE")
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="default: all of the list")
    parser.add_argument("--newest", type=int, metavar="N", help="the newest N pairs of each")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N pairs in all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--repeat", type=int, default=MineLimits.repeat, metavar="N")
    parser.add_argument(
        "--update-list", action="store_true", help="ask the index for the packages' releases"
    )
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.update_list:
        return _update(options)
    if options.out is None:
        raise InputError("--out DIR is needed: where the records and tasks.jsonl are to go")
    candidates = read_candidates(options.list)
    if options.packages:
        names = {candidate.name for candidate in candidates}
        if unknown := sorted(set(options.packages) - names):
            raise InputError(f"not in {options.list}: {', '.join(unknown)}")
        candidates = [c for c in candidates if c.name in options.packages]
    chosen = pairs(candidates, options.newest)[: options.limit]
    if not chosen:
        raise InputError("no two adjacent releases to compare")
    limits = replace(MineLimits(), repeat=options.repeat)
    asyncio.run(_mine(chosen, limits, options))
    summary = _summary(_records(options.out))
    write_atomic(options.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary) if options.json else _text(summary))
    return 0


async def _mine(chosen: Sequence[Pair], limits: MineLimits, options: argparse.Namespace) -> None:
    """One record a pair, whole or absent: an interrupted run goes on where it was."""
    index = PackageIndex(pip_settings())
    waiting = [pair for pair in chosen if not _place(options.out, pair, limits).is_file()]
    done, found = len(chosen) - len(waiting), len(_merge(options.out))
    queue = iter(waiting)
    room = Limits(wall_s=limits.suite_s, output_bytes=1 << 20)
    async with LocalPool(options.jobs, room, options.backend) as pool:
        with progress("mine") as report:
            report(done, len(chosen), f"{found} tasks")

            async def work() -> None:
                nonlocal done, found
                for pair in queue:
                    record = await _one(pair, limits, index, pool)
                    place = _place(options.out, pair, limits)
                    write_atomic(place, json.dumps(record.record()) + "\n")
                    done, found = done + 1, found + len(record.tasks)
                    _merge(options.out)
                    report(done, len(chosen), f"{found} tasks; {pair.name}: {record.status}")

            async with asyncio.TaskGroup() as group:
                for _ in range(options.jobs):
                    group.create_task(work())


async def _one(pair: Pair, limits: MineLimits, index: PackageIndex, pool: LocalPool) -> PairRecord:
    """Fetch both releases and mine them; what cannot be had is a refusal with its reason.

    An index that cannot be reached is no fact about a pair: that raises.
    """
    try:
        new, old = await asyncio.to_thread(_have, pair, index)
    except IndexUnreachable:
        raise
    except InputError as error:
        record = PairRecord(pair.candidate.name, pair.old.version, pair.new.version)
        record.reason = str(error)[:300]
        return record
    return await mine_pair(new, old, pair.new.uploaded, limits, pool)


def _have(pair: Pair, index: PackageIndex) -> tuple[Package, Package]:
    candidate, older = pair.candidate, pair.release(pair.old)
    fetch([pair.release(pair.new), older])
    old = package_of(older, candidate.split, candidate.skip)
    return prepare(candidate, pair.new, index), old


def _place(out: Path, pair: Pair, limits: MineLimits) -> Path:
    facts = (VERSION, limits, pair.old, pair.new, pair.candidate.split, pair.candidate.skip)
    stamp = hashlib.sha256(repr((*facts, pair.candidate.extra)).encode()).hexdigest()[:8]
    return out / "pairs" / f"{pair.name}-{stamp}.json"


def _records(out: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted((out / "pairs").glob("*.json")):
        try:
            found.append(json.loads(file.read_text()))
        except ValueError as error:
            raise InputError(f"{file}: damaged, delete it: {error}") from None
    return found


def _merge(out: Path) -> list[dict[str, Any]]:
    """Join all records' tasks; in the order of hashes, so that any start is a fair sample."""
    rows = [task.record() for record in _records(out) for task in tasks_of(record)]
    rows.sort(key=lambda row: row["sha256"])
    write_jsonl(out / "tasks.jsonl", rows)
    return rows


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tasks = [task for record in records for task in record["tasks"]]
    reasons = Counter(
        record["reason"].split(":")[0] for record in records if record["status"] != "tasks"
    )
    pieces: Counter[str] = Counter()
    for record in records:
        pieces.update(record["pieces"])
    seconds = sum(record["seconds"] for record in records)
    return {
        "pairs": dict(Counter(record["status"] for record in records)),
        "tasks": len(tasks),
        "operator": dict(Counter(task["operator"] for task in tasks)),
        "package": dict(Counter(task["package"] for task in tasks).most_common()),
        "split": dict(Counter(task["split"] for task in tasks)),
        "pieces": dict(pieces),
        "dropped_tests": sum(len(record["dropped"]) for record in records),
        "reasons": dict(reasons.most_common(20)),
        "seconds": round(seconds, 1),
        "tasks_per_hour": round(3600 * len(tasks) / seconds, 1) if seconds else 0.0,
    }


def _text(summary: dict[str, Any]) -> str:
    lines = [f"{summary['tasks']} tasks from {sum(summary['pairs'].values())} pairs"]
    for key in ("pairs", "operator", "split", "pieces", "package", "reasons"):
        lines.append(f"{key}:")
        lines += [f"  {name:<40} {count:>5}" for name, count in summary[key].items()]
    lines.append(f"{summary['tasks_per_hour']} tasks an hour of one job")
    return "\n".join(lines)


def _update(options: argparse.Namespace) -> int:
    """List the releases of the packages of the list, or of those named, anew."""
    known = {c.name: c for c in read_candidates(options.list)} if options.list.is_file() else {}
    index = PackageIndex(pip_settings())
    names = options.packages or list(known)
    fresh: dict[str, Candidate] = dict(known)
    with progress("list") as report:
        for done, name in enumerate(names, start=1):
            fresh[name] = candidate_from(index, name, known.get(name))
            report(done, len(names), name)
    write_candidates(options.list, fresh.values())
    count = len(pairs(fresh.values()))
    answer = {"packages": len(fresh), "pairs": count, "list": str(options.list)}
    text = f"{len(fresh)} packages, {count} pairs in {options.list}"
    print(json.dumps(answer) if options.json else text)
    return 0
