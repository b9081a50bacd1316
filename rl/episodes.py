"""The episodes of a run folder as reports and tables need them: without token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import InputError
from configs.files import iter_jsonl
from sandbox.environments import Environment, other
from sft.trajectory import WRITTEN

Side = TypeVar("Side")

# names of policies, in the order in which a run makes them
POLICIES = {"noop": "No-op", "teacher": "Teacher", "sft": "SFT", "rl": "SFT+RL"}

# what is kept of a record; token ids, authors and logprobs stay in the run folder
LISTED = ("task", "package", "operator", "split", "policy", "seed")
OPENED = (
    *("turns", "patch", "verdict", "reward", "stop", "seconds", "sandbox_s", "weight_version"),
    *("environment", "other_verdict"),
)


@dataclass(frozen=True)
class Episode:
    """One trajectory record, less its token ids, and where it came from.

    Attributes:
      source: name of its file without `.jsonl`, e.g. "eval-rl".
      nth: how many episodes of the same task stand before it in that file.
      tokens, sampled: all tokens of the episode, and those that the policy wrote.
      tool_counts: calls by tool name.
      run: name of its run, where a page shows several.
    """

    source: str
    nth: int
    record: dict[str, Any]
    tokens: int
    sampled: int
    tool_counts: dict[str, int]
    run: str = ""

    @property
    def task(self) -> str:
        return self.record["task"]

    @property
    def policy(self) -> str:
        return str(self.record["policy"])

    @property
    def package(self) -> str:
        return str(self.record["package"])

    @property
    def operator(self) -> str:
        return str(self.record["operator"])

    @property
    def verdict(self) -> dict[str, Any]:
        verdict = self.record["verdict"]
        return verdict if isinstance(verdict, dict) else {}

    @property
    def environment(self) -> Environment:
        """Where it took place; runs from before there were two do not say."""
        return "full" if self.record.get("environment") == "full" else "simplified"

    @property
    def verdicts(self) -> dict[Environment, dict[str, Any]]:
        """The verdicts that there are, by environment."""
        second = self.record.get("other_verdict")
        found = {self.environment: self.verdict}
        if isinstance(second, dict) and second:
            found[other(self.environment)] = second
        return found

    @property
    def outcome(self) -> str:
        """pass, fail, quarantine, error, or "none" without a verdict."""
        return str(self.verdict.get("verdict") or "none")

    @property
    def flags(self) -> list[str]:
        """What the verdict found odd, e.g. "protected:tests/test_a.py"."""
        flags = self.verdict.get("flags")
        return [str(flag) for flag in flags] if isinstance(flags, list) else []

    @property
    def success(self) -> bool:
        return self.outcome == "pass"

    @property
    def evaluated(self) -> bool:
        return self.source.startswith("eval")


def read_episodes(run: Path, name: str = "") -> list[Episode]:
    """Every episode of a run folder, file by file; they carry `name` as their run.

    Raises InputError, naming file and line, for a record that is none.
    """
    files = sorted((run / "trajectories").glob("*.jsonl"))
    return [episode for path in files for episode in _of_file(path, name)]


def by_policy(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """The evaluated episodes by policy: those of POLICIES in their order, then others by name."""
    found: dict[str, list[Episode]] = {}
    for episode in episodes:
        if episode.evaluated:
            found.setdefault(episode.policy, []).append(episode)
    rank = {policy: place for place, policy in enumerate(POLICIES)}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def tool_use(sides: Mapping[Side, Sequence[Episode]]) -> dict[str, dict[Side, float]]:
    """Calls an episode: tool -> side -> mean. A side without episodes is left out."""
    names = sorted({tool for side in sides.values() for e in side for tool in e.tool_counts})
    return {
        tool: {
            name: sum(e.tool_counts.get(tool, 0) for e in side) / len(side)
            for name, side in sides.items()
            if side
        }
        for tool in names
    }


def choose(episodes: list[Episode], limit: int) -> list[Episode]:
    """At most `limit`: evaluations, last policy first, then an even choice of the others."""
    evaluated = [episode for episode in episodes if episode.evaluated]
    rank = {policy: place for place, policy in enumerate(reversed(POLICIES))}
    evaluated.sort(key=lambda episode: rank.get(episode.policy, len(rank)))
    others = [episode for episode in episodes if not episode.evaluated]
    room = limit - len(evaluated)
    if room <= 0:
        return evaluated[:limit]
    if room < len(others):
        others = [others[index * len(others) // room] for index in range(room)]
    return evaluated + others


def _of_file(path: Path, run: str) -> Iterator[Episode]:
    seen: dict[str, int] = {}
    for number, record in enumerate(iter_jsonl(path), start=1):
        try:
            task = str(record["task"])
            counts: dict[str, int] = {}
            for turn in record["turns"]:
                for call in turn["calls"]:
                    counts[call["name"]] = counts.get(call["name"], 0) + 1
            episode = Episode(
                source=path.stem,
                nth=seen.get(task, 0),
                record={
                    **{key: record.get(key) for key in (*LISTED, *OPENED)},
                    "task": task,
                    "prompt": str(record.get("prompt", "")),
                },
                tokens=len(record.get("ids", ())),
                sampled=sum(a in WRITTEN for a in record.get("author", ())),
                tool_counts=record.get("tool_counts", counts),
                run=run,
            )
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path}:{number}: not a trajectory record") from None
        seen[task] = episode.nth + 1
        yield episode
