"""`remend serve SNAPSHOT`: start SGLang, or sglang-jax, for a snapshot; or print the command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from configs.errors import InputError


def main(argv: list[str]) -> int:
    """Becomes the server; with --print or --json prints its command instead."""
    parser = argparse.ArgumentParser(prog="remend serve", description=__doc__)
    parser.add_argument("snapshot", type=Path, help="a Hugging Face folder, e.g. of a run")
    parser.add_argument("--kind", choices=("sglang", "sglang-jax"), help="default: as the chip is")
    parser.add_argument("--chip", choices=("cpu", "cuda", "tpu"), help="default: what is here")
    parser.add_argument("--python", default="", help="of the environment with the server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--requests", type=int, default=32, help="at one time")
    parser.add_argument("--tokens", type=int, default=0, help="in the cache; 0: as it likes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the snapshot's")
    parser.add_argument("--print", action="store_true", help="print the command, for another host")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="more flags of the server")
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        raise InputError(f"--port must be 1 to 65535, got {args.port}")
    if args.requests < 1 or args.tokens < 0:
        raise InputError("--requests must be at least 1, and --tokens at least 0")

    from model.export_folder import check_manifest
    from model.hf import checked_tensors, read_config
    from rl.launch import Kind, Launch, chip_here, interpreter
    from rl.snapshot import label_of

    config = read_config(args.snapshot)
    whole = check_manifest(args.snapshot) is not None
    stored = checked_tensors(args.snapshot, config)[0][1].dtype
    name = args.snapshot.name
    version = int(name[1:]) if name.startswith("v") and name[1:].isdecimal() else 0
    chip = args.chip or chip_here()
    kind: Kind = args.kind or ("sglang-jax" if chip == "tpu" else "sglang")
    elsewhere = args.print or args.json
    launch = Launch(
        kind,
        chip,
        args.python or "python" if elsewhere else interpreter(args.python, kind),
        args.snapshot,
        label_of(args.snapshot, version) if whole else "unverified",
        host=args.host,
        port=args.port,
        dtype=args.dtype or stored.name,
        requests=args.requests,
        tokens=args.tokens or (8192 if chip == "cpu" else 0),
        flags=tuple(args.flags),
    )
    command = launch.command()
    if args.json:
        print(json.dumps({"command": command, "label": launch.label, "kind": kind, "chip": chip}))
    elif args.print:
        print(shlex.join(command))
    else:
        print(f"{kind} on {args.host}:{args.port} as {launch.label}", file=sys.stderr, flush=True)
        os.execv(command[0], command)
    return 0
