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
from sandbox.backends import BACKENDS, make_pool
from sandbox.base import ExecResult, Limits, Tree
from sandbox.docker import ContainerConfig, DockerHost
from sandbox.measure import measure
from sandbox.peers import PEERS, parse_peer
from sandbox.probe import check


def main(argv: list[str]) -> int:
    """Run `remend sandbox {check,run,bench}`."""
    parser = argparse.ArgumentParser(prog="remend sandbox", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    checking = verbs.add_parser("check", help="try to break out of each backend, and say how far")
    _common(checking)

    running = verbs.add_parser("run", help="run one command in a sandbox")
    running.add_argument("--backend", choices=BACKENDS, default="auto")
    running.add_argument("--dir", type=Path, help="folder to work on a copy of (default: empty)")
    running.add_argument("--timeout", type=float, default=Limits.wall_s, help="seconds")
    _common(running)
    running.add_argument("command", nargs="+", metavar="-- CMD", help="the command")

    benching = verbs.add_parser("bench", help="lease, reset, exec and episodes/s of each backend")
    benching.add_argument("--backend", choices=BACKENDS[1:], action="append", help="all by default")
    benching.add_argument("--rounds", type=int, default=30, help="of each measure (%(default)s)")
    benching.add_argument("--slots", type=int, default=4, help="at one time (%(default)s)")
    benching.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"with docker: another project's environment ({', '.join(PEERS)}), by its interpreter",
    )
    _common(benching)

    options = parser.parse_args(argv)
    try:
        options.hosts = [DockerHost(url, tls=options.tls) for url in options.host]
    except ValueError as error:
        raise InputError(f"--host: {error}") from None
    return {"check": _check, "run": _run, "bench": _bench}[options.verb](options)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="URL",
        help="docker: an engine, unix://, tcp:// or ssh:// (default: DOCKER_HOST, or local)",
    )
    parser.add_argument(
        "--tls", default="", metavar="DIR", help="docker: ca.pem, cert.pem, key.pem"
    )
    parser.add_argument("--image", default="", help="docker: image, or folder with a Dockerfile")
    parser.add_argument("--runtime", default="", help="docker: OCI runtime, such as runsc")


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
    limits = Limits(wall_s=options.timeout)
    async with make_pool(options.backend, 1, limits, options.hosts, _container(options)) as pool:
        async with pool.lease(Tree(root)) as sandbox:
            return await sandbox.exec(options.command)


def _container(options: argparse.Namespace) -> ContainerConfig:
    return ContainerConfig(image=options.image, runtime=options.runtime)


def _bench(options: argparse.Namespace) -> int:
    if options.rounds < 3 or options.slots < 1:
        raise InputError("--rounds must be at least 3, and --slots at least 1")
    names = options.backend or list(BACKENDS[1:])
    found = asyncio.run(
        measure(
            names,
            options.hosts,
            options.rounds,
            options.slots,
            _container(options),
            [parse_peer(text) for text in options.peer],
        )
    )
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{'':<20} {'':<12} {'value':>10}  x a fresh container")
        for row in found["rows"]:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:>8.1f}"
            print(f"{row['name']:<20} {row['measure']:<12} {row['value']:>10.2f}  {ratio}")
        for name, ratios in found["peers"].items():
            print(f"docker beside {name}: " + ", ".join(f"{k} {v:g} x" for k, v in ratios.items()))
        for name, why in found["unavailable"].items():
            print(f"{name}: NOT MEASURED: {why}", file=sys.stderr)
    return 0 if found["rows"] else 1


def _check(options: argparse.Namespace) -> int:
    """Print what every backend contains; 0 if one that works here contains everything."""
    found = asyncio.run(check(options.hosts, _container(options)))
    if options.json:
        print(json.dumps(found))
    else:
        for name, facts in found["backends"].items():
            print(f"{name}: {facts.get('unavailable') or 'works'}")
            for item in facts.get("checks", ()):
                mark = "contained" if item["contained"] else "NOT CONTAINED"
                print(f"  {item['name']:<18} {mark:<14} {item['seen']}")
        print(f"auto chooses: {found['auto']}")
    return 0 if found["contained"] else 1
