"""`remend tasks agree`: near-miss patches judged in both environments, and how far those agree."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import append_jsonl, read_jsonl
from sandbox.agreement import agreement, table
from sandbox.environments import ENVIRONMENTS
from sandbox.local import LocalPool
from sandbox.near_misses import KINDS, Attempt, near_misses
from sandbox.task import Task, load_tasks
from sandbox.task_index import NAMED
from sandbox.verdict import judge
from tools.progress import progress
from tools.suites import judged_in_full


def add_agree(verbs: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser = verbs.add_parser("agree", help="near-miss patches judged in both environments")
    parser.add_argument("--index", default="releases", help=f"{', '.join(NAMED)}, or a .jsonl file")
    parser.add_argument("--split", choices=("train", "heldout"))
    parser.add_argument("--limit", type=int, metavar="N", help="tasks, evenly spread")
    parser.add_argument("--each", type=int, default=1, metavar="N", help="patches of each kind")
    parser.add_argument("--seed", type=int, default=0, help="which patches are drawn")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="a line a patch; resumes"
    )
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    with progress("tasks") as report:
        tasks = load_tasks(
            options.index, options.split, options.limit, lambda n, of: report(n, of, "")
        )
    if not tasks:
        raise InputError(f"no tasks in {options.index}")
    left_out, rows = asyncio.run(_judge_all(tasks, options))
    answer = {"tasks": len(tasks), "left_out": left_out, **summary(rows)}
    print(json.dumps(answer) if options.json else _text(answer))
    return 0


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`{"agreement", "by_kind": {KIND: agreement}, "disagree": [rows]}` of judged patches."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    kinds = {kind: by_kind[kind] for kind in KINDS if by_kind[kind]}
    every = [row for some in kinds.values() for row in some]
    apart = [row for row in every if len({row[name] == "pass" for name in ENVIRONMENTS}) == 2]
    return {
        "agreement": _agreement(every),
        "by_kind": {kind: _agreement(some) for kind, some in kinds.items()},
        "disagree": [row for row in apart if "error" not in (row[name] for name in ENVIRONMENTS)],
    }


def _agreement(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return agreement({name: {"verdict": row[name]} for name in ENVIRONMENTS} for row in rows)


async def _judge_all(
    tasks: Sequence[Task], options: argparse.Namespace
) -> tuple[int, list[dict[str, Any]]]:
    """How many tasks `full` cannot judge, and a row for each patch of the others; rows that are in
    the file already are not made again. Tasks come in random order: an interrupted run is a sample.
    """
    known = {}
    if options.out.exists():
        try:
            known = {(row["task"], row["sha256"]): row for row in read_jsonl(options.out)}
        except (KeyError, TypeError):
            raise InputError(
                f"{options.out}: not a file of tasks agree: choose another --out"
            ) from None
    rows: list[dict[str, Any]] = []
    async with LocalPool(options.jobs, backend=options.backend) as pool:
        kept = await judged_in_full(tasks, pool, options.jobs)
        queue = iter(random.Random(options.seed).sample(kept, len(kept)))
        with progress("agree") as report:
            done = 0

            async def worker() -> None:
                nonlocal done
                for task in queue:
                    for attempt in near_misses(task, options.each, options.seed):
                        digest = hashlib.sha256(attempt.patch.encode()).hexdigest()
                        row = known.get((task.name, digest))
                        if row is None:
                            row = await _row(task, attempt, digest, pool)
                            append_jsonl(options.out, row)
                        rows.append(row)
                    done += 1
                    report(done, len(kept), f"{len(rows)} patches")

            async with asyncio.TaskGroup() as group:
                for _ in range(options.jobs):
                    group.create_task(worker())
    return len(tasks) - len(kept), rows


async def _row(task: Task, attempt: Attempt, digest: str, pool: LocalPool) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task.name, "kind": attempt.kind, "sha256": digest}
    failed: dict[str, list[str]] = {}
    for name in ENVIRONMENTS:
        verdict = await judge(task, attempt.patch, pool, environment=name)
        row[name] = verdict.verdict
        outcomes = verdict.fail_to_pass | verdict.pass_to_pass
        failed[name] = [id for id, how in outcomes.items() if how != "passed"]
        row[f"{name}_seconds"] = round(verdict.seconds, 3)
        row[f"{name}_tests"] = len(outcomes)
        if name == "full":
            row["build"] = verdict.build
    row["full_failed"] = failed["full"][:5]
    row["simplified_failed"] = failed["simplified"][:5]
    return row | {"patch": attempt.patch}


def _text(answer: dict[str, Any]) -> str:
    lines = [table(answer["agreement"]), ""]
    lines.append(f"{'kind':<10} {'n':>5} {'both':>6} {'simpl.':>7} {'full':>6} {'none':>6}  passed")
    for kind, found in answer["by_kind"].items():
        lines.append(
            f"{kind:<10} {found['n']:>5} {found['both_pass']:>6} {found['simplified_only']:>7} "
            f"{found['full_only']:>6} {found['both_fail']:>6}"
        )
    for row in answer["disagree"]:
        which = "simplified" if row["simplified"] == "pass" else "full"
        lines.append(f"only {which} passes: {row['task']} ({row['kind']})")
    if answer["left_out"]:
        lines.append(f"{answer['left_out']} of {answer['tasks']} tasks cannot be judged in full")
    return "\n".join(lines)
