"""`remend sandbox`: what isolation this machine gives, and a command run inside it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from configs.errors import InputError
from sandbox.base import ExecResult, Limits, Tree
from sandbox.local import BACKENDS, LocalPool
from sandbox.probe import check


def main(argv: list[str]) -> int:
    """Run `remend sandbox {check,run}`."""
    parser = argparse.ArgumentParser(prog="remend sandbox", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    checking = verbs.add_parser("check", help="try to break out of each backend, and say how far")
    checking.add_argument("--json", action="store_true", help="one JSON object on stdout")

    running = verbs.add_parser("run", help="run one command in a sandbox")
    running.add_argument("--backend", choices=BACKENDS, default="auto")
    running.add_argument("--dir", type=Path, help="folder to work on a copy of (default: empty)")
    running.add_argument("--timeout", type=float, default=Limits.wall_s, help="seconds")
    running.add_argument("--json", action="store_true", help="one JSON object on stdout")
    running.add_argument("command", nargs="+", metavar="-- CMD", help="the command")

    options = parser.parse_args(argv)
    if options.verb == "check":
        return _check(options.json)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    if not 0 < options.timeout < 1e6:
        raise InputError(f"--timeout must be more than 0 seconds, not {options.timeout}")
    if options.dir is not None and not options.dir.is_dir():
        raise InputError(f"--dir {options.dir}: no such folder")
    with tempfile.TemporaryDirectory(prefix="remend-run-") as empty:
        root = Path(empty) if options.dir is None else options.dir.resolve()
        result = asyncio.run(_execute(options, root))
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        sys.stdout.write(result.stdout)
        sys.stderr.write(result.stderr)
        if result.killed_by:
            print(f"remend: killed: {result.killed_by}", file=sys.stderr)
    return 0 if result.exit_code == 0 and result.killed_by is None else 1


async def _execute(options: argparse.Namespace, root: Path) -> ExecResult:
    async with LocalPool(1, Limits(wall_s=options.timeout), options.backend) as pool:
        async with pool.lease(Tree(root)) as sandbox:
            return await sandbox.exec(options.command)


def _check(as_json: bool) -> int:
    """Print what every backend contains; 0 if one that works here contains everything."""
    found = asyncio.run(check())
    if as_json:
        print(json.dumps(found))
    else:
        for name, facts in found["backends"].items():
            print(f"{name}: {facts.get('unavailable') or 'works'}")
            for item in facts.get("checks", ()):
                mark = "contained" if item["contained"] else "NOT CONTAINED"
                print(f"  {item['name']:<18} {mark:<14} {item['seen']}")
        print(f"auto chooses: {found['auto']}")
    return 0 if found["contained"] else 1
