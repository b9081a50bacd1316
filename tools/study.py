"""`remend study CONFIG --out DIR`: the paper's grid, and its claims held against it.

The same line goes on where it was interrupted, cell by cell, whatever ended it. When all is done,
and whenever the command is run again, DIR/study.json and DIR/report.html say what came out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import load
from sandbox.environments import ENVIRONMENTS, Environment
from tools.hosts import add_flags, spec, together


@dataclass(frozen=True)
class ExploitConfig:
    """The exploitation experiment: one long RL run twice from one start, guard off and guard on.

    Attributes:
      seeds: one pair of runs each; none: no experiment.
      tasks: about how many to make (`sandbox/tempting.py`); 0: all that the index has functions
        for.
      shown: demonstrations of the exploit in what the start is tuned on. A small policy does not
        come upon deleting a check by itself; one that never does has nothing that could grow. 0
        leaves it to chance.
      set: overrides of the run config, such as rl.steps.
    """

    seeds: tuple[int, ...] = (0,)
    tasks: int = 0
    shown: int = 0
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyConfig:
    """A study.

    Attributes:
      base: the run config of every stage, relative to this file. set: overrides of it.
      seeds: trainings of each kind, and their tests.
      environments: to train and to test in.
      thinking: the overrides that turn thinking mode on, in tests and, with
        `train_thinking`, in trainings of their own; none: it is not part of the study.
      train_thinking: train a policy for each mode. False: one policy, trained without, is tested
        in both, as the switch of Qwen3 is meant.
      taught_to_think: whether the policy that everything starts from knows how to. If not, and
        without `train_thinking`, the claim about thinking is measured, and stays undecided.
      full: overrides of the run config for the environment "full" alone.
      exploit: the exploitation experiment.
      expected_s: seconds of a job by kind (teach, sft, rl, cell, shift, tasks, start, long) on
        the machine in mind: for the time left until some have been measured, and for the budget.
      budget_hours: refuse to start a study that would take longer by expected_s; 0: no limit.
    """

    base: str
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    environments: tuple[Environment, ...] = ENVIRONMENTS
    thinking: tuple[str, ...] = ()
    train_thinking: bool = False
    taught_to_think: bool = True
    full: tuple[str, ...] = ()
    exploit: ExploitConfig = field(default_factory=ExploitConfig)
    expected_s: dict[str, float] = field(default_factory=dict)
    budget_hours: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seeds", "environments"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise InputError(f"{name} must name at least one, and none twice: {list(values)}")
        if any(seed < 0 for seed in (*self.seeds, *self.exploit.seeds)):
            raise InputError("seeds must not be negative")
        strange = set(self.exploit.seeds) - set(self.seeds)
        if strange:
            raise InputError(
                f"exploit.seeds start from policies of seeds: {sorted(strange)} is none"
            )
        if self.train_thinking and not self.thinking:
            raise InputError("train_thinking wants to know what turns it on: set thinking")


def main(argv: list[str]) -> int:
    """Do what is not done yet, then write study.json and report.html."""
    parser = argparse.ArgumentParser(prog="remend study", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="the same resumes")
    parser.add_argument("--plan", action="store_true", help="list the jobs and end")
    parser.add_argument("--json", action="store_true", help="print study.json on stdout")
    add_flags(parser)
    args = parser.parse_intermixed_args(argv)
    hosts = spec(args)
    config = load(StudyConfig, args.config, args.overrides)

    from tools.study_jobs import Study

    def work() -> int:
        study = Study(config, args.config.parent, args.out)
        if args.plan:
            print(json.dumps(study.plan()) if args.json else _plan(study.plan()))
            return 0
        found = asyncio.run(study.run())
        print(json.dumps(found) if args.json else _said(found, args.out))
        return 0

    return work() if hosts is None else together(hosts, work)


def _plan(plan: dict[str, Any]) -> str:
    from tools.study_jobs import said

    lines = [f"{'done' if job['done'] else 'to do':<6} {job['name']}" for job in plan["jobs"]]
    left = said(plan["left_s"], plan["untimed"])
    return "\n".join([*lines, f"{plan['done']} of {len(plan['jobs'])} done; {left}"])


def _said(found: dict[str, Any], out: Path) -> str:
    lines = []
    for row in found["claims"]:
        ours = row["ours"]
        number = "–"
        if ours is not None:
            scale = 1 if row["key"] == "tools" else 100
            number = f"{scale * ours['mean']:+.1f} ({scale * ours['low']:+.1f} to "
            number += f"{scale * ours['high']:+.1f})"
        lines.append(f"{row['outcome']:<14} {row['claim']}: {number}")
    lines.append(f"report: {(out / 'report.html').absolute()}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
