"""A study's numbers: rows of cells put side by side, and the claims held against them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import read_jsonl
from rl import claims
from rl.analysis import changes, edit_counts, failure, shares, tool_counts, transitions
from rl.episodes import Episode, read_episodes
from rl.exploitation import Outcome, summary
from rl.resample import crossed, pass_at_k
from rl.study_grid import Cell, costs, read_rows

Rows = Mapping[Cell, Mapping[str, Any]]


def study_record(
    out: Path, cells: Sequence[Cell], environments: Sequence[str], *, thinks: bool
) -> dict[str, Any]:
    """What study.json says: `cells`, one row each; `groups`, the cells that differ by seed alone,
    together; `claims`, one row each; `analyses`; `exploitation`.

    `thinks`: the policies were taught to think. Of others the claim about thinking is measured, and
    stays undecided.

    Raises InputError for a damaged file.
    """
    rows = read_rows(out, cells)
    compared = Comparison(out, rows, environments)
    exploited = exploitation(out)
    return {
        "environments": list(environments),
        "cells": [dict(row) for row in rows.values()],
        "groups": groups(rows),
        "claims": compared.claims(exploited, thinks),
        "analyses": compared.analyses(),
        "exploitation": exploited,
    }


def groups(rows: Rows) -> list[dict[str, Any]]:
    """Cells that differ by seed alone: success over seeds and tasks with its interval, each seed's
    own success, pass@k and costs, which are means over seeds."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in rows:
        found.setdefault((cell.policy, cell.trained, cell.tested, cell.thinking), []).append(cell)
    result = []
    for (policy, trained, tested, thinking), members in found.items():
        mine = [rows[cell] for cell in members]
        common = _common(mine)
        result.append(
            {
                "policy": policy,
                "trained": trained,
                "tested": tested,
                "thinking": thinking,
                "seeds": {str(cell.seed): rows[cell]["success"]["mean"] for cell in members},
                "success": crossed(_matrix(mine, common)),
                "pass_at": _pass_at(mine, common),
                "cost": {
                    key: float(np.mean([row["cost"][key] for row in mine]))
                    for key in mine[0]["cost"]
                },
            }
        )
    return result


def _pass_at(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """pass@1 and pass@k for the most tries that all have, with intervals."""
    most = min(row["tasks"][task][1] for row in rows for task in tasks)
    found = {}
    for k in sorted({1, most}):
        values = [
            [pass_at_k(row["tasks"][t][1], row["tasks"][t][0], k) for t in tasks] for row in rows
        ]
        found[str(k)] = crossed(np.array(values))
    return found


def _common(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks that all of the rows have: an environment may be unable to judge some."""
    return sorted(set.intersection(*(set(row["tasks"]) for row in rows)))


def _matrix(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> np.ndarray:
    """Mean success, float [rows, tasks]."""
    return np.array([[r["tasks"][t][0] / r["tasks"][t][1] for t in tasks] for r in rows])


class Comparison:
    """Differences between cells, paired by seed and task."""

    def __init__(self, out: Path, rows: Rows, environments: Sequence[str]) -> None:
        self._out, self._rows, self._environments = out, rows, environments
        self._seeds = sorted({cell.seed for cell in rows})
        self._tasks = _common(list(rows.values())) if rows else []
        self._read: dict[Cell, list[Episode]] = {}

    def success(self, policy: str, trained: str, tested: str, thinking: bool) -> np.ndarray | None:
        """float [seeds, tasks]; None unless every seed's cell is done."""
        cells = [Cell(policy, trained, tested, thinking, seed) for seed in self._seeds]
        if not cells or not all(cell in self._rows for cell in cells) or not self._tasks:
            return None
        return _matrix([self._rows[cell] for cell in cells], self._tasks)

    def episodes(self, cell: Cell) -> list[Episode]:
        """Of a cell, on the tasks that all cells have."""
        if cell not in self._read:
            found = read_episodes(self._out / "cells" / cell.name)
            self._read[cell] = [e for e in found if e.task in set(self._tasks)]
        return self._read[cell]

    def _over(
        self, difference: Callable[[str], np.ndarray | None], where: Sequence[str] = ()
    ) -> tuple[dict[str, float] | None, dict[str, Any]]:
        """The mean of a difference over environments, and that of each; without those not done."""
        parts = {}
        for environment in where or self._environments:
            found = difference(environment)
            if found is not None:
                parts[environment] = found
        if not parts:
            return None, {}
        whole = crossed(np.mean(list(parts.values()), axis=0))
        return whole, {name: crossed(found) for name, found in parts.items()}

    def _gain(self, trained: str, tested: str, before: str = "sft") -> np.ndarray | None:
        source = trained if before == "sft" else ""
        first = self.success(before, source, tested, False)
        second = self.success("rl", trained, tested, False)
        return None if first is None or second is None else second - first

    def claims(self, exploited: Mapping[str, Any] | None, thinks: bool) -> list[dict[str, Any]]:
        """One row each, in the paper's order."""
        gaps, matched, elsewhere, lost, thought = (
            self._over(lambda e: self._less(("sft", e, e, False), ("teacher", "", e, False))),
            self._over(lambda e: self._gain(e, e)),
            self._over(self._gain_elsewhere),
            self._over(self._lost),
            self._over(self._thinking),
        )
        over_base = self._over(lambda e: self._gain(e, e, "base"))
        found = []
        for key, (ours, parts), judged in (
            ("student", gaps, claims.student),
            ("gain", matched, claims.gain),
        ):
            extra = {"over the untuned policy": over_base[0]} if key == "gain" else {}
            outcome = judged(ours) if ours is not None else "undecided"
            note = ""
            if key == "gain" and ours is not None and outcome == "undecided" and ours["low"] > 0:
                note = "there is a gain; whether it reaches 7 points is open"
            found.append(claims.row(key, ours, outcome, note, parts | extra))
        found.append(_transfer_row(matched[0], elsewhere, lost[0]))
        found.append(_thinking_row(*thought, thinks))
        found.append(_exploitation_row(exploited))
        found.append(self._tools_row())
        return found

    def _less(self, one: tuple[str, str, str, bool], other: tuple[str, str, str, bool]) -> Any:
        a, b = self.success(*one), self.success(*other)
        return None if a is None or b is None else a - b

    def _other(self, environment: str) -> str | None:
        return next((e for e in self._environments if e != environment), None)

    def _gain_elsewhere(self, trained: str) -> np.ndarray | None:
        other = self._other(trained)
        return None if other is None else self._gain(trained, other)

    def _lost(self, trained: str) -> np.ndarray | None:
        matched, elsewhere = self._gain(trained, trained), self._gain_elsewhere(trained)
        return None if matched is None or elsewhere is None else matched - elsewhere

    def _thinking(self, environment: str) -> np.ndarray | None:
        e = environment
        found = [self._less((p, e, e, True), (p, e, e, False)) for p in ("sft", "rl")]
        return None if any(f is None for f in found) else np.mean(found, axis=0)

    def _pairs(self, environment: str) -> list[tuple[list[Episode], list[Episode]]]:
        """Episodes before and after RL, tested where trained, for each seed."""
        found = []
        for seed in self._seeds:
            before, after = (Cell(p, environment, environment, False, seed) for p in ("sft", "rl"))
            if before in self._rows and after in self._rows:
                found.append((self.episodes(before), self.episodes(after)))
        return found

    def _tools_row(self) -> dict[str, Any]:
        # the simplified environment first: there the paper saw it
        for environment in sorted(self._environments, reverse=True):
            pairs = self._pairs(environment)
            if pairs:
                found = changes(pairs, tool_counts)
                name = next(iter(found), None)
                if name is None:
                    return claims.row("tools", None, "undecided", "no policy called a tool")
                note = f"largest change, {name}, of {len(found)} tools; {environment} environment"
                return claims.row("tools", found[name], claims.tools(found), note, found)
        return claims.row("tools", None, "undecided")

    def analyses(self) -> dict[str, Any]:
        """By environment, of cells without thinking tested where trained: tools, calls in sequence,
        edits and failures of each policy over all seeds, and what RL changed."""
        found: dict[str, Any] = {}
        for environment in self._environments:
            stages = {}
            for policy in ("teacher", "base", "sft", "rl"):
                trained = environment if policy in ("sft", "rl") else ""
                cells = [Cell(policy, trained, environment, False, s) for s in self._seeds]
                episodes = [e for c in cells if c in self._rows for e in self.episodes(c)]
                if episodes:
                    stages[policy] = _stage(episodes)
            pairs = self._pairs(environment)
            if stages:
                found[environment] = {"stages": stages}
            kl = _kl(self._out, environment)
            if kl:
                found.setdefault(environment, {})["kl"] = kl
            if pairs:
                found[environment]["tools"] = changes(pairs, tool_counts)
                found[environment]["edits"] = changes(pairs, edit_counts)
        return found


def _kl(out: Path, environment: str) -> dict[str, Any]:
    """seed -> KL by type of token (`rl.shift.kl_by_type`)."""
    paths = sorted((out / "shift").glob(f"{environment}-seed*.json"))
    return {path.stem.rpartition("seed")[2]: json.loads(path.read_bytes())["kl"] for path in paths}


def _stage(episodes: Sequence[Episode]) -> dict[str, Any]:
    calls = {tool: 0.0 for e in episodes for tool in e.tool_counts}
    for episode in episodes:
        for tool, count in episode.tool_counts.items():
            calls[tool] += count / len(episodes)
    return {
        "episodes": len(episodes),
        "tools": dict(sorted(calls.items())),
        "transitions": transitions(episodes),
        "failures": shares([failure(episode) for episode in episodes]),
        "cost": costs(episodes),
    }


def exploitation(out: Path) -> dict[str, Any] | None:
    """Of the runs of all seeds whose outcomes are there; None unless both sides have one."""
    sides: dict[str, list[Outcome]] = {"off": [], "on": []}
    for name, outcomes in sides.items():
        for path in sorted((out / "exploit").glob(f"{name}-seed*/outcomes.jsonl")):
            outcomes += [Outcome(**record) for record in read_jsonl(path)]
    return summary(sides["off"], sides["on"]) if all(sides.values()) else None


def _thinking_row(
    ours: dict[str, float] | None, parts: dict[str, Any], thinks: bool
) -> dict[str, Any]:
    if ours is not None and not thinks:
        note = "never taught to think: this is what the switch costs a policy that cannot"
        return claims.row("thinking", ours, "undecided", note, parts)
    outcome = claims.thinking(ours) if ours is not None else "undecided"
    return claims.row("thinking", ours, outcome, "", parts)


def _transfer_row(
    matched: Mapping[str, float] | None,
    elsewhere: tuple[dict[str, float] | None, dict[str, Any]],
    lost: dict[str, float] | None,
) -> dict[str, Any]:
    ours, parts = elsewhere
    if matched is None or ours is None or lost is None:
        return claims.row("transfer", None, "undecided")
    outcome = claims.transfer(matched, ours, lost)
    note = "no gain where trained is certain: there is nothing that could carry over"
    parts = parts | {"where trained": dict(matched), "where trained less elsewhere": lost}
    return claims.row("transfer", ours, outcome, note if matched["low"] <= 0 else "", parts)


def _exploitation_row(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return claims.row("exploitation", None, "undecided")
    ours = found["rise"]["off"]
    late, difference = found["last_quarter"], found["difference"]
    parts = {
        "rise, guard on": found["rise"]["on"],
        "exploit rate at the end, guard off": late["off"]["exploited"],
        "exploit rate at the end, guard on": late["on"]["exploited"],
        "guard on less off, exploit rate": difference["exploited"],
        "guard on less off, all tests pass": difference["repaired"],
    }
    return claims.row("exploitation", ours, claims.exploitation(ours), "", parts)
