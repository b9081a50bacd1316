"""A study as one page: claims first, then the grid, curves, analyses and episodes to browse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import iter_jsonl, write_atomic
from rl import report_study_parts as parts
from rl.episodes import Episode, choose, read_episodes
from rl.figures import Dot, Dots, Figure, Lines
from rl.report import MAX_EPISODES, page, section
from rl.report_charts import Line
from rl.report_sections import Series, curves, series
from rl.study_grid import grid
from rl.study_tables import study_record

EXPLOITS = 400  # episodes of each run of the exploitation experiment that can be browsed


def is_study(folder: Path) -> bool:
    """Whether the folder holds a study, finished or under way, rather than a run."""
    return (folder / "study.json").is_file() or (folder / "study.yaml").is_file()


def write_study(folder: Path) -> Path:
    """Write `folder/report.html` and return its path.

    Raises InputError if study.json is not there or damaged, and as `read_episodes` does.
    """
    study = read_study(folder)
    learnt = _curves(folder)
    trainings = list(dict.fromkeys(name for lines in learnt.values() for name in lines))
    sections = [
        section("The paper's claims", parts.claims(study["claims"])),
        section("Held-out success", parts.grid(study["groups"], study["environments"])),
        section("What it cost", parts.costs(study["groups"], study.get("walls", {}))),
        section("Learning curves", curves(learnt, trainings)),
        section("Exploitation: guard off and on", parts.exploitation(study["exploitation"])),
        section("Tool use", parts.tools(study["analyses"])),
        section("How far RL moved the policy", parts.shift(study["analyses"])),
        section("Which edits became likelier", parts.edits(study["analyses"])),
        section("Why episodes fail", parts.failures(study["analyses"])),
    ]
    episodes, total = _episodes(folder, study)
    name = folder.resolve().name
    text = page(name, parts.headline(study["claims"]), sections, episodes, total)
    path = folder / "report.html"
    write_atomic(path, text)
    return path


def read_study(folder: Path) -> dict[str, Any]:
    """`study.json` of a folder; of a study under way, what it would say of the cells that are done.

    Raises InputError if a file of it is damaged.
    """
    path = folder / "study.json"
    try:
        study = json.loads(path.read_bytes())
    except FileNotFoundError:
        return _so_far(folder)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    keys = {"claims", "groups", "cells", "analyses", "exploitation", "environments"}
    if not isinstance(study, dict) or not keys <= study.keys():
        raise InputError(f"{path}: not a study's record")
    return study


def _so_far(folder: Path) -> dict[str, Any]:
    path = folder / "study-config.json"
    try:
        config = json.loads(path.read_bytes())
        environments = [str(name) for name in config["environments"]]
        cells = grid(environments, bool(config["thinking"]), config["seeds"])
        thinks = bool(config.get("taught_to_think", True) or config["train_thinking"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a study's: {error}") from None
    return study_record(folder, cells, environments, thinks=thinks)


def figures_of_study(folder: Path) -> list[Figure]:
    """Every figure of the page that has data. Raises InputError as `read_study` does."""
    study = read_study(folder)
    found: list[Figure] = []
    for tested in study["environments"]:
        for thinking in (False, True):
            rows = []
            for group in study["groups"]:
                if (group["tested"], group["thinking"]) == (tested, thinking):
                    label = parts.policy_name(group)
                    value = group["success"]
                    dot = Dot(group["policy"], label, value["mean"], value["low"], value["high"])
                    rows.append((label, [dot]))
            if rows:
                mode = ", thinking" if thinking else ""
                title = f"Held-out success in the {tested} environment{mode}"
                found.append(Dots(title, "share of tasks", rows, 1.0))
    exploitation = study["exploitation"]
    if exploitation:
        for measure, title in parts.MEASURES.items():
            lines, bands = parts.bands(exploitation["curves"], measure)
            sides = {name: sorted(line.items()) for name, line in lines.items()}
            found.append(Lines(title, sides, bands))
    for name, lines in sorted(_curves(folder).items()):
        drawn: dict[str, Line] = {label: sorted(line.items()) for label, line in lines.items()}
        if name in ("rl/success", "rl/reward", "sft/loss") and any(drawn.values()):
            found.append(Lines(name, drawn))
    return found


def _curves(folder: Path) -> dict[str, Series]:
    """Metric -> training -> step -> value, of every training."""
    found: dict[str, Series] = {}
    for path in sorted(folder.glob("train/*/metrics.jsonl")):
        for metric, lines in series(list(iter_jsonl(path))).items():
            for line in lines.values():
                found.setdefault(metric, {})[path.parent.name] = line
    return found


def _episodes(folder: Path, study: Mapping[str, Any]) -> tuple[list[Episode], int]:
    """Those that can be browsed, and how many there are in all: the cells without thinking of the
    first seed, tested where trained first, and the last quarter of each long run."""
    rows = [row for row in study["cells"] if not row["thinking"]]
    first = min((row["seed"] for row in rows), default=0)
    rows = [row for row in rows if row["seed"] == first]
    rows.sort(key=lambda row: row["trained"] not in ("", row["tested"]))
    total = sum(sum(n for _, n in row["tasks"].values()) for row in study["cells"])
    found: list[Episode] = []
    for row in rows:
        label = f"{row['trained']} → {row['tested']}" if row["trained"] else f"→ {row['tested']}"
        found += read_episodes(folder / "cells" / row["cell"], label)
    long: list[Episode] = []
    for guard in ("off", "on"):
        for run in sorted((folder / "exploit").glob(f"{guard}-seed*")):
            done = [e for e in read_episodes(run, f"guard {guard}") if e.source.startswith("rl-")]
            total += len(done)
            late = max((e.source for e in done), default="rl-0")
            last = int(late.split("-")[1].split(".")[0])
            end = [e for e in done if _step(e) > last - max(1, last // 4)]
            long += choose(end, EXPLOITS)
    return choose(found, MAX_EPISODES - len(long)) + long, total


def _step(episode: Episode) -> int:
    return int(episode.source.split("-")[1].split(".")[0])
