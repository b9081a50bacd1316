"""The grid of a study: its cells, and what each finished one says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import InputError
from rl.episodes import Episode
from rl.evaluate import success
from rl.resample import pass_at_k


@dataclass(frozen=True)
class Cell:
    """One policy tested once over.

    Attributes:
      policy: "teacher", "base", "sft" or "rl".
      trained: the environment that its weights were trained in; "" for teacher and base.
      tested: the environment of its episodes.
      thinking: whether it was tested in thinking mode.
      seed: of its training, and of its episodes.
    """

    policy: str
    trained: str
    tested: str
    thinking: bool
    seed: int

    @property
    def name(self) -> str:
        """A folder's name, unique in the grid."""
        trained = f"-from-{self.trained}" if self.trained else ""
        mode = "-thinking" if self.thinking else ""
        return f"{self.policy}{trained}-in-{self.tested}{mode}-seed{self.seed}"


def grid(environments: Sequence[str], thinking: bool, seeds: Sequence[int]) -> list[Cell]:
    """{teacher, base, SFT, SFT+RL} × trained in × tested in × thinking off and on × seeds.

    A teacher that searches has no thinking mode, and teacher and base were trained in neither
    environment: they have no such cells.
    """
    modes = (False, True) if thinking else (False,)
    found = []
    for seed in seeds:
        for tested in environments:
            found.append(Cell("teacher", "", tested, False, seed))
            found += [Cell("base", "", tested, mode, seed) for mode in modes]
            for trained in environments:
                for mode in modes:
                    found += [Cell(p, trained, tested, mode, seed) for p in ("sft", "rl")]
    return found


def row_of(cell: Cell, episodes: Sequence[Episode], seconds: float) -> dict[str, Any]:
    """A cell's row of study.json.

    success: mean over tasks with its 95 % interval over tasks. pass_at: by k, up to the tries that
    every task had. cost: means of an episode; `sandbox_s` is the time that its tool calls and its
    verdict took. tasks: by task, [successes, tries]. Tokens are counted with the prompt, `sampled`
    are the policy's own. wall_s: of the whole cell.
    """
    tasks: dict[str, list[int]] = {}
    for episode in episodes:
        won = tasks.setdefault(episode.task, [0, 0])
        won[0] += episode.success
        won[1] += 1
    fewest = min(tries for _, tries in tasks.values())
    pass_at = {
        str(k): float(np.mean([pass_at_k(n, c, k) for c, n in tasks.values()]))
        for k in range(1, fewest + 1)
    }
    outcomes: dict[str, int] = {}
    for episode in episodes:
        outcomes[episode.outcome] = outcomes.get(episode.outcome, 0) + 1
    return {
        "cell": cell.name,
        **asdict(cell),
        "success": success(episodes),
        "pass_at": pass_at,
        "cost": costs(episodes),
        "outcomes": dict(sorted(outcomes.items())),
        "tasks": dict(sorted(tasks.items())),
        "wall_s": round(seconds, 1),
    }


def costs(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means of an episode."""
    count = len(episodes)
    return {
        "tokens": sum(e.tokens for e in episodes) / count,
        "sampled": sum(e.sampled for e in episodes) / count,
        "calls": sum(sum(e.tool_counts.values()) for e in episodes) / count,
        "turns": sum(len(e.record["turns"]) for e in episodes) / count,
        "sandbox_s": sum(float(e.record.get("sandbox_s") or 0.0) for e in episodes) / count,
        "seconds": sum(float(e.record.get("seconds") or 0.0) for e in episodes) / count,
    }


def read_rows(folder: Path, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
    """The rows of the cells that are done. Raises InputError for one that is damaged."""
    found = {}
    for cell in cells:
        path = folder / "cells" / cell.name / "cell.json"
        if path.exists():
            try:
                found[cell] = json.loads(path.read_bytes())
            except ValueError as error:
                raise InputError(f"{path}: not valid JSON: {error}") from None
    return found
