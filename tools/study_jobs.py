"""The jobs of a study, each in a folder of its own with a mark that is written last.

    train/ENV[-thinking]-seedN/   a run folder: teach, then SFT, then RL  {teach,sft,rl}.json
    cells/NAME/                   a run folder with one evaluation         cell.json
    exploit/…                     the exploitation experiment (tools/study_exploit.py)

A job whose mark is there is done; one that is not goes on by what its stages keep themselves.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from configs.schema import dump, to_dict
from configs.schema import load as load_config
from model.folder import load_policy
from model.hosts import barrier, exists, host_count, host_index
from model.sharding import make_mesh, param_shardings
from rl.episodes import read_episodes
from rl.report_sections import duration
from rl.report_study import read_study, write_study
from rl.shift import kl_by_type, scored
from rl.study_grid import Cell, grid, row_of
from rl.study_tables import study_record
from sft.trajectory import load
from tools.pipeline import Pipeline
from tools.run_config import RunConfig
from tools.run_config import check as check_run
from tools.study import StudyConfig
from tools.study_exploit import Exploit

Work = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """kind: for the time it takes. mark: the file that says it is done. work: its result."""

    kind: str
    name: str
    mark: Path
    work: Work

    @property
    def done(self) -> bool:
        return self.mark.exists()


class Study:
    """A study's folder and its jobs. Everything that the config says is checked here, before
    anything is written."""

    def __init__(self, config: StudyConfig, folder: Path, out: Path) -> None:
        self.config, self.out = config, out
        self._base = folder / config.base
        for env in config.environments:
            for thinking in self._modes:
                check_run(self.run_config(env, thinking), rl=True)
        self.exploit = Exploit(self) if config.exploit.seeds else None
        self.cells = grid(config.environments, bool(config.thinking), config.seeds)
        self.jobs = self._jobs()

    @property
    def _modes(self) -> tuple[bool, ...]:
        return (False, True) if self.config.thinking else (False,)

    def run_config(self, environment: str, thinking: bool, *more: str) -> RunConfig:
        """The run config of a stage in one environment and mode."""
        overrides = [*self.config.set, f"environment={environment}"]
        overrides += self.config.full if environment == "full" else ()
        overrides += self.config.thinking if thinking else ()
        config = load_config(RunConfig, self._base, [*overrides, *more])
        if config.teach.teacher == "dataset":
            raise InputError(
                "a study's teacher plays the held-out tasks, too, and with teach.teacher=dataset "
                "there is none that could: set search or endpoint"
            )
        return config

    def trained(self, environment: str, thinking: bool, seed: int) -> Path:
        """The run folder of a training; `thinking`: of the cell that wants it."""
        mode = "-thinking" if thinking and self.config.train_thinking else ""
        return self.out / "train" / f"{environment}{mode}-seed{seed}"

    def plan(self) -> dict[str, Any]:
        """The jobs; `left_s`: seconds that those to do will take; `untimed`: those among them of
        whose kind that is not known."""
        jobs = [{"kind": j.kind, "name": j.name, "done": j.done} for j in self.jobs]
        left, untimed = self.left()
        done = sum(j.done for j in self.jobs)
        return {"jobs": jobs, "done": done, "left_s": left, "untimed": untimed}

    def left(self) -> tuple[float, int]:
        """Seconds that the jobs which are not done will take, as those of their kind took that
        are, else as the config expects; and how many are of a kind that has neither."""
        took: dict[str, list[float]] = {}
        for job in self.jobs:
            if job.done:
                took.setdefault(job.kind, []).append(_seconds(job.mark))
        left, untimed = 0.0, 0
        for job in self.jobs:
            if not job.done:
                known = took.get(job.kind)
                each = sum(known) / len(known) if known else self.config.expected_s.get(job.kind)
                left += each or 0.0
                untimed += each is None
        return left, untimed

    async def run(self) -> dict[str, Any]:
        """Every job that is not done, in order; then study.json and the report."""
        self._check_budget()
        self._keep_config()
        _compile_once(self.out / ".compiled")
        for number, job in enumerate(self.jobs, 1):
            if exists(job.mark):
                continue
            if host_index() == 0:
                where = f"study {number}/{len(self.jobs)}"
                print(f"{where}: {job.name}; {said(*self.left())}", file=sys.stderr, flush=True)
            began = time.monotonic()
            result = await job.work()
            if host_index() == 0:
                result = {"seconds": round(time.monotonic() - began, 1), **result}
                write_atomic(job.mark, json.dumps(result) + "\n")
            barrier(f"{job.name} done")
        if host_index() == 0:
            self._write()
        barrier("the study's record")
        return read_study(self.out)

    def _write(self) -> None:
        """study.json and the report."""
        walls: dict[str, float] = {}
        for job in self.jobs:
            walls[job.kind] = round(walls.get(job.kind, 0.0) + _seconds(job.mark), 1)
        found = study_record(
            self.out,
            self.cells,
            self.config.environments,
            thinks=self.config.taught_to_think or self.config.train_thinking,
        )
        found |= {"wall_s": round(sum(walls.values()), 1), "walls": walls}
        write_atomic(self.out / "study.json", json.dumps(found, indent=1) + "\n")
        write_study(self.out)

    def _jobs(self) -> list[Job]:
        """What is needed comes first, and one seed is whole before the next."""
        jobs: list[Job] = []
        for seed in self.config.seeds:
            for mode in (False, True) if self.config.train_thinking else (False,):
                for env in self.config.environments:
                    folder = self.trained(env, mode, seed)
                    for stage in ("teach", "sft", "rl"):
                        work = _bound(self._train, stage, env, mode, seed)
                        name = f"{stage} {folder.name}"
                        jobs.append(Job(stage, name, folder / f"{stage}.json", work))
            for cell in self.cells:
                if cell.seed == seed:
                    mark = self.out / "cells" / cell.name / "cell.json"
                    jobs.append(Job("cell", cell.name, mark, _bound(self._test, cell)))
            for env in self.config.environments if host_count() == 1 else ():
                mark = self.out / "shift" / f"{env}-seed{seed}.json"
                jobs.append(
                    Job("shift", f"shift {mark.stem}", mark, _bound(self._shift, env, seed))
                )
            if self.exploit is not None and seed in self.config.exploit.seeds:
                jobs += [Job(*job) for job in self.exploit.jobs(seed)]
        return jobs

    async def _train(self, stage: str, environment: str, thinking: bool, seed: int) -> dict:
        config = self.run_config(environment, thinking)
        folder = self.trained(environment, thinking, seed)
        rl = stage == "rl"
        serves = rl and config.server.kind == "inprocess"
        async with Pipeline(config, folder, seed, rl=rl, serves=serves) as pipeline:
            taught = await pipeline.teach()
            if stage == "teach":
                kept = sum(t.success for t in taught)
                return {"episodes": len(taught), "kept": kept}
            params = await pipeline.sft(taught)
            if rl:
                await pipeline.rl(params, taught)
        return {"snapshot": str(folder / "snapshots" / stage)}

    async def _test(self, cell: Cell) -> dict[str, Any]:
        config = self.run_config(cell.tested, cell.thinking)
        folder = self.out / "cells" / cell.name
        began = time.monotonic()
        serves = cell.policy != "teacher"
        async with Pipeline(config, folder, cell.seed, rl=False, serves=serves) as pipeline:
            params = None
            if cell.policy == "base":
                params = pipeline.start.params
            elif cell.policy != "teacher":
                run = self.trained(cell.trained, cell.thinking, cell.seed)
                params = pipeline.load(run / "snapshots" / cell.policy)
            await pipeline.evaluate(cell.policy, params)
        return row_of(cell, read_episodes(folder), time.monotonic() - began)

    async def _shift(self, environment: str, seed: int) -> dict[str, Any]:
        """KL of SFT+RL to SFT by type of token, on what SFT+RL did where it was trained."""
        config = self.run_config(environment, False)
        cell = self.out / "cells" / Cell("rl", environment, environment, False, seed).name
        mesh = make_mesh(config.mesh) if config.mesh.devices > 1 else None
        before = load_policy(
            self.trained(environment, False, seed) / "snapshots" / "sft",
            shardings=None if mesh is None else lambda model: param_shardings(model, mesh),
            **asdict(config.network),
        )
        done = load(cell / "trajectories" / "eval-rl.jsonl")
        reference = scored(
            done,
            before.params,
            before.config,
            temperature=config.agent.temperature,
            row_tokens=config.rl.row_tokens,
            rows=config.rl.microbatch_rows,
            mesh=mesh,
        )
        return {"kl": kl_by_type(done, reference, before.tokenizer)}

    def _check_budget(self) -> None:
        hours, (left, untimed) = self.config.budget_hours, self.left()
        if hours and untimed:
            raise InputError("budget_hours: expected_s must name every kind of job")
        if hours and left > 3600 * hours:
            raise InputError(
                f"by expected_s and what was measured this takes {left / 3600:.1f} h more, and "
                f"budget_hours is {hours:g}: take fewer seeds, tasks or steps, or raise it"
            )

    def _keep_config(self) -> None:
        """Write what the study is of, or check that a resumed one is of the same."""
        path = self.out / "study.yaml"
        own = dump(self.config)
        text = f"{own}# base\n{dump(load_config(RunConfig, self._base, list(self.config.set)))}"
        # what changes no number may change, and what nothing was made by yet
        made = exists(self.out / "exploit" / "tasks.json")
        free = ("budget_hours", "expected_s", "taught_to_think", *(() if made else ("exploit",)))
        if exists(path) and _without(path.read_text(), free) != _without(text, free):
            raise InputError(
                f"{self.out} holds a study with another config: choose another --out, "
                "or delete that folder"
            )
        barrier(f"{path} read")
        if host_index() == 0:
            write_atomic(path, text)
            write_atomic(self.out / "study-config.json", json.dumps(to_dict(self.config)) + "\n")


def said(left: float, untimed: int) -> str:
    """The time left, for people."""
    more = f"{' and ' if left else ''}{untimed} jobs not timed yet" if untimed else ""
    return f"time left {duration(left) if left or not untimed else ''}{more}"


def _without(text: str, names: Sequence[str]) -> str:
    """A kept config without these settings."""
    lines, inside = [], False
    for line in text.splitlines():
        name = line.partition(":")[0]
        inside = name in names or (inside and line.startswith(" "))
        if not inside:
            lines.append(line)
    return "\n".join(lines)


def _bound(function: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any) -> Work:
    return lambda: function(*arguments)


def _seconds(mark: Path) -> float:
    try:
        return float(json.loads(mark.read_bytes())["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{mark}: damaged: delete it, and its job is done again") from error


def _compile_once(folder: Path) -> None:
    """Have jobs of the same shapes share what JAX compiles, also after a restart."""
    import jax

    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
