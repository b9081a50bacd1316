"""`remend tasks`: make repair tasks, prove them, judge a patch, and count what there is."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from configs.errors import InputError
from configs.files import write_jsonl
from sandbox import backends
from sandbox.environments import ENVIRONMENTS
from sandbox.local import LocalPool
from sandbox.task import Task, load_tasks
from sandbox.task_index import NAMED, in_build_order, make, read_index, releases_of, source_of
from sandbox.verdict import judge
from sandbox.verify import Check, verify
from tools.agreeing import add_agree
from tools.card import add_card
from tools.exporting import add_export
from tools.fetching import fetch_all
from tools.importing import add_import
from tools.making import add_mutate, table
from tools.mining import add_mine
from tools.progress import progress

BACKENDS = ("auto", "bwrap", "plain")


def main(argv: list[str]) -> int:
    """Run `remend tasks {mine,mutate,import,verify,judge,agree,rebuild,export,stats,card}`."""
    parser = argparse.ArgumentParser(prog="remend tasks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    names = ", ".join(NAMED)

    making = add_mutate(verbs)
    mining = add_mine(verbs)
    carding = add_card(verbs)
    importing = add_import(verbs)
    exporting = add_export(verbs)
    agreeing = add_agree(verbs)

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
    judging.add_argument(
        "--environment",
        choices=ENVIRONMENTS,
        default="simplified",
        help="whose checks decide: the task's own tests, or build and whole suite (%(default)s)",
    )
    judging.set_defaults(run=_judge)

    building = verbs.add_parser("rebuild", help="write an index's tasks as Harbor directories")
    building.add_argument("--out", type=Path, required=True)
    building.add_argument("--index", default="shipped", help=f"{names}, or a .jsonl file")
    building.add_argument("--limit", type=int, metavar="N")
    building.set_defaults(run=_rebuild)

    counting = verbs.add_parser("stats", help="counts by source, split, package and operator")
    counting.add_argument("--index", default="all", help=f"{names}, a .jsonl file, or a folder")
    counting.set_defaults(run=_stats)

    verbs_of = (making, mining, proving, judging, building, counting, carding)
    for verb in (*verbs_of, importing, exporting, agreeing):
        verb.add_argument("--json", action="store_true", help="one JSON object on stdout")
    for verb in (making, mining, proving, importing, agreeing):
        verb.add_argument("--backend", choices=BACKENDS, default="auto", help="of the sandbox")
    judging.add_argument(
        "--backend", choices=backends.BACKENDS, default="auto", help="docker: as DOCKER_HOST says"
    )
    options = parser.parse_args(argv)
    for name in ("limit", "repeat", "jobs", "per_function", "newest", "count", "each"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return options.run(options)


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
        "refused": sum(bool(check.refused) for check in checks),
        "repeat": options.repeat,
        "verdicts": sum(check.runs for check in checks),
    }
    told = [_told(check) for check in checks if not check.flips]
    told.append(f"{good} of {len(checks)} tasks fail before and pass after, {options.repeat}x")
    _answer(options.json, answer, "\n".join(told))
    return 0 if good == len(checks) else 1


def _told(check: Check) -> str:
    if check.refused:
        return f"refused: {check.refused}"
    return f"{check.task}: before {check.before}, after {check.after}"


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
        async with backends.make_pool(options.backend, 1) as pool:
            return asdict(await judge(task, patch, pool, environment=options.environment))

    verdict = asyncio.run(run())
    flags = f" ({', '.join(verdict['flags'])})" if verdict["flags"] else ""
    failed = [
        f"{id}: {outcome}"
        for id, outcome in (verdict["fail_to_pass"] | verdict["pass_to_pass"]).items()
        if outcome != "passed"
    ]
    if verdict["build"] not in ("", "passed"):
        failed = [f"the build fails: {verdict['build']}"]
    _answer(options.json, verdict, "\n".join([*failed, verdict["verdict"] + flags]))
    return 0 if verdict["verdict"] == "pass" else 1


def _find(name: str) -> Task:
    """A task by its directory, or by its name in the shipped index."""
    if "/" in name or Path(name).is_dir():
        return Task.load(Path(name))
    for row in read_index("all"):
        if row.name == name:
            fetch_all(releases_of([row]))
            return make(row)
    raise InputError(f"{name}: neither a task directory nor a shipped task (see tasks stats)")


# -- rebuild


def _rebuild(options: argparse.Namespace) -> int:
    """Make every task of the index again; `build` compares each with its recorded hash."""
    rows = read_index(options.index)[: options.limit]
    fetch_all(releases_of(rows))
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
    _answer(options.json, {"tasks": len(facts), **counts}, table(counts))
    return 0


# -- shared


def _load(index: str, split: str | None = None, limit: int | None = None) -> list[Task]:
    with progress("tasks") as report:
        return load_tasks(index, split, limit, lambda done, total: report(done, total, ""))


def _answer(as_json: bool, answer: dict, text: str) -> None:
    print(json.dumps(answer) if as_json else text)
