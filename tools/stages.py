"""`remend teach|sft|rl|eval CONFIG`: one stage of a run, after the stages it needs."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import load
from sandbox.agreement import agreement
from tools.hosts import add_flags, spec, together

if TYPE_CHECKING:
    from sft.trajectory import Trajectory


def _parse(verb: str, argv: list[str], **extra: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"remend {verb}", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="run folder; the same resumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    add_flags(parser)
    return parser.parse_intermixed_args(argv)


def teach(argv: list[str]) -> int:
    """Collect the teacher's trajectories."""
    keep = {
        "type": Path,
        "metavar": "DIR",
        "help": "also write a TFDS dataset of what SFT learns from",
    }
    return _stage("teach", argv, dataset=keep)


def sft(argv: list[str]) -> int:
    """Teach, then fine-tune."""
    return _stage("sft", argv)


def rl(argv: list[str]) -> int:
    """Teach and fine-tune where not yet done, then reinforce."""
    return _stage("rl", argv)


def evaluate(argv: list[str]) -> int:
    """Success on the held-out tasks: of a stage of this run, or of a Hugging Face folder."""
    return _stage("eval", argv, policy={"default": "rl", "help": "noop, teacher, sft, rl, or DIR"})


def _stage(verb: str, argv: list[str], **extra: Any) -> int:
    args = _parse(verb, argv, **extra)
    hosts = spec(args)

    from tools.run_config import RunConfig

    config = load(RunConfig, args.config, args.overrides)

    def work() -> int:
        if verb == "teach" and args.dataset is not None:
            from configs.tfds_folder import free_place
            from sft.dataset import NAME, VERSION

            free_place(args.dataset, NAME, VERSION)  # refused before anything is taught
        outcome = asyncio.run(_run(verb, config, args))
        lines = (f"{k}: {v}" for k, v in outcome.items())
        print(json.dumps(outcome) if args.json else "\n".join(lines))
        return 0

    return work() if hosts is None else together(hosts, work)


async def _run(verb: str, config: Any, args: argparse.Namespace) -> dict[str, Any]:
    from model.hf import load_hf
    from tools.pipeline import Pipeline

    stage = args.policy if verb == "eval" else verb
    serves = config.server.kind == "inprocess" if verb == "rl" else verb == "eval"
    serves = serves and stage not in ("noop", "teacher")
    serves |= stage in ("sft", "rl") and config.sft.validation.success_every > 0
    given = verb == "eval" and stage not in ("noop", "teacher", "sft", "rl")
    other = load_hf(Path(stage)).params if given else None  # refused before anything is written
    async with Pipeline(config, args.out, args.seed, rl=stage == "rl", serves=serves) as pipeline:
        if verb == "eval" and args.policy in ("noop", "teacher"):
            return _evaluated(config, await pipeline.evaluate(args.policy))
        if other is not None:
            name = Path(args.policy).name
            return _evaluated(config, await pipeline.evaluate(name, other))
        taught = await pipeline.teach()
        if verb == "teach":
            return _taught(pipeline, taught, args.dataset)
        params = await pipeline.sft(taught)
        if stage == "rl":
            params = await pipeline.rl(params, taught)
        if verb == "eval":
            return _evaluated(config, await pipeline.evaluate(stage, params))
        return {"run": str(args.out), "snapshot": str(args.out / "snapshots" / stage)}


def _evaluated(config: Any, done: Sequence[Trajectory]) -> dict[str, Any]:
    """Success in the run's environment, and, if both judged, how far they agree."""
    from rl.evaluate import success

    found = {**success(done), "environment": config.environment}
    if config.judge_both:
        found["agreement"] = agreement(episode.verdicts for episode in done)
    return found


def _taught(pipeline: Any, taught: Any, dataset: Path | None) -> dict[str, Any]:
    """How teaching went: what SFT would learn from, what it would not and why, and the cost."""
    from model.hosts import host_index
    from sft.dataset import write_dataset
    from sft.spending import Spending
    from tools.fine_tune import examples
    from tools.progress import progress

    solved, kept = sum(t.success for t in taught), examples(pipeline, taught)
    outcome = {"episodes": len(taught), "kept": len(kept), "success": solved / max(len(taught), 1)}
    outcome["dropped"] = dict(sorted(kept.dropped.items()))
    if pipeline.config.teach.teacher == "endpoint":
        endpoint = pipeline.config.teach.endpoint
        spent = Spending(pipeline.run, endpoint.prices, endpoint.budget)
        prompt, completion = spent.tokens
        outcome |= {"requests": spent.requests, "prompt_tokens": prompt}
        outcome |= {"completion_tokens": completion, "usd": spent.usd}
    if dataset is not None and host_index() == 0:
        with progress("dataset") as report:
            path = write_dataset(dataset, kept, lambda done, of: report(done, of, ""))
        outcome["dataset"] = str(path)
    return outcome
