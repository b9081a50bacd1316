"""`remend VERB …`: picks the verb's module and imports nothing else, so that help is instant."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable

from configs.errors import InputError, Preempted

# verb -> (module with `main(argv) -> int`, or module:function; one line of help)
VERBS = {
    "quickstart": ("tools.quickstart", "the whole loop, small: tasks, SFT, RL and the report"),
    "tasks": ("tools.tasks", "make, verify, judge and count repair tasks"),
    "sandbox": ("tools.sandbox", "what isolation this machine gives; run one command inside"),
    "pretrain": ("tools.pretrain", "train the tokenizer and a tiny policy on package sources"),
    "teach": ("tools.stages:teach", "collect the teacher's trajectories"),
    "sft": ("tools.stages:sft", "train on the teacher's verified trajectories"),
    "rl": ("tools.stages:rl", "train with GRPO against sandboxes"),
    "eval": ("tools.stages:evaluate", "success of a policy on held-out tasks"),
    "convert": ("tools.checkpoints:convert", "checkpoints: Hugging Face, Orbax and MaxText"),
    "score": ("tools.checkpoints:score", "log-probabilities of token ids under a checkpoint"),
    "generate": ("tools.checkpoints:generate", "continue token ids under a checkpoint"),
    "plan": ("tools.plan.cli", "what a run costs on a TPU slice, compiled ahead of time"),
    "serve": ("tools.serve", "start an SGLang policy server for a snapshot, or print the command"),
    "simulate": ("tools.simulate", "size an asynchronous run from latencies, before renting it"),
    "study": ("tools.study", "the paper's grid and its six claims, trained and tested"),
    "report": ("tools.report", "a run as a page, two runs beside each other, figures for papers"),
    "watch": ("tools.watch", "a running job in the terminal"),
    "bench": ("tools.bench.cli", "tokens a second beside named peers, in one run"),
}

# top-level module -> what to install when it is missing
INSTALLS = {
    **dict.fromkeys(
        ("jax", "flax", "optax", "orbax", "grain", "tokenizers", "safetensors", "httpx2"), "remend"
    ),
    **dict.fromkeys(("numpy", "yaml", "pydantic", "rich", "unearth", "pytest"), "remend"),
    "docker": "remend[docker]",
    "libtpu": "remend[tpu]",
    "maxtext": "remend[tpu]",
    "tensorflow_datasets": "remend[datasets]",
    "tensorboardX": "remend[tensorboard]",
    "torch": "remend[parity]",
    "transformers": "remend[parity]",
    "wandb": "remend[wandb]",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit code: 0 success, 1 the thing asked about is not so, 2 bad input.

    With the flags of several hosts also 70, another host is gone, and 75, stopped by SIGTERM with
    everything kept: the same command, on all hosts, goes on from there.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in VERBS:
        return _run(argv[0], argv[1:])
    if argv and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see remend --help"
        return _fail(f"unknown verb {argv[0]}: {hint}")
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="remend",
        usage="remend VERB [options]",
        description="Train agents that repair code.",
        epilog=f"verbs:\n{verbs}\n\n`remend VERB --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    parser.print_help()
    return 0 if argv else 2


def entry(verb: str) -> Callable[[list[str]], int]:
    """The function behind a verb; importing its module may take a while."""
    module, _, function = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(module), function or "main")


def _run(verb: str, argv: list[str]) -> int:
    """Import the verb's module and call it; what a person can mend becomes one line."""
    try:
        return entry(verb)(argv)
    except (Exception, KeyboardInterrupt) as error:
        code = explain(error)
        if code is None:
            raise
        return code


def explain(error: BaseException) -> int | None:
    """Print one line for an error that a person can mend, and give the exit code; None for our own
    faults."""
    match error:
        case InputError():
            return _fail(str(error))
        case Preempted():
            print(f"remend: stopped by SIGTERM: {error}; same command resumes", file=sys.stderr)
            return 75  # EX_TEMPFAIL of sysexits.h
        case BaseExceptionGroup(exceptions=[first, *_]):  # of things done side by side
            return explain(first)
        case KeyboardInterrupt():
            print("remend: interrupted", file=sys.stderr)
            return 130
        case ModuleNotFoundError():
            package = (error.name or "").partition(".")[0]
            if package in INSTALLS:
                return _fail(f"{package} is not installed: pip install '{INSTALLS[package]}'")
    return None


def _fail(message: str) -> int:
    print("remend: error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
