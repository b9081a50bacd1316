"""`remend bench WHAT`: remend beside named peers; picks the module and imports nothing else."""

from __future__ import annotations

import argparse
import importlib

# what -> (module with `main(argv) -> int`, one line of help)
BENCHES = {
    "model": ("tools.bench.model", "train step, log-probabilities and sampling, tokens a second"),
    "ahead": (
        "tools.bench.ahead",
        "rollouts ahead of the learner, and in turn with it: episodes an hour",
    ),
    "pipeline": ("tools.bench.pipeline", "SFT's input beside the training that it feeds"),
    "plan": ("tools.bench.plan", "a train step compiled for a TPU slice: memory, bytes sent"),
}


def main(argv: list[str]) -> int:
    """Run `remend bench {model,ahead,pipeline,plan}`."""
    lines = "\n".join(f"  {what:<8}  {text}" for what, (_, text) in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="remend bench",
        usage="remend bench WHAT [options]",
        description="remend side by side with named peers, in one run.",
        epilog=f"{lines}\n\n`remend bench WHAT --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=BENCHES, metavar="WHAT", help=", ".join(BENCHES))
    what = parser.parse_args(argv[:1]).what
    return importlib.import_module(BENCHES[what][0]).main(argv[1:])
