"""The record of one episode, and the file it is kept in (JSON lines)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, overload

from configs.errors import InputError
from configs.files import read_jsonl, read_record, write_jsonl
from sandbox.environments import Environment, other

# Who wrote a token; the policy also writes what is then not carried out, and carries no loss.
ENVIRONMENT, POLICY, DROPPED, FORCED = 0, 1, 2, 3
WRITTEN = (POLICY, DROPPED)  # by the policy itself


@dataclass
class Turn:
    """One policy turn and what came back. Text is a view; the ids are the truth."""

    text: str
    calls: list[dict[str, Any]]
    observations: list[str]


@dataclass
class Trajectory:
    """One episode, token by token.

    Attributes:
      ids: every token of the episode, prompt first.
      author: for each id, `POLICY` (sampled, trained on), `ENVIRONMENT`, or `DROPPED`: sampled, but
        calls behind a test run that passed, which had no effect and are not trained on; or
        `FORCED`: put into the policy's turn to end its thinking, and not trained on.
      logprobs: for each id, its sampling log-probability in nats (0.0 where it was not sampled).
      weight_version: version of the weights that sampled its end; -1 for a policy without weights.
      versions: the same for each id; -1 where it was not sampled.
      environment: where it took place: "simplified" or "full" (`sandbox.environments`).
      verdict: that environment's; other_verdict: the other one's on the same diff, {} where it was
        not asked.
      reward: 1.0 for a passing verdict, else 0.0.
      seconds: of the whole episode; sandbox_s: of those, in tool calls and the verdict.
      stop: why the episode ended: "submit", "turns", "tokens"; "sandbox" if that broke; "declined"
        or "budget" where the teacher's endpoint would not go on, or could not be paid for it.
    """

    task: str
    package: str
    operator: str
    split: str
    policy: str
    seed: int
    weight_version: int
    prompt: str
    ids: list[int] = field(default_factory=list)
    author: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    patch: str = ""
    verdict: dict[str, Any] = field(default_factory=dict)
    reward: float = 0.0
    stop: str = ""
    seconds: float = 0.0
    sandbox_s: float = 0.0
    environment: Environment = "simplified"
    other_verdict: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        return self.verdict.get("verdict") == "pass"

    @property
    def verdicts(self) -> dict[Environment, dict[str, Any]]:
        """The verdicts that there are, by environment."""
        found = {self.environment: self.verdict, other(self.environment): self.other_verdict}
        return {name: verdict for name, verdict in found.items() if verdict}

    @property
    def oldest_version(self) -> int:
        """The oldest version that sampled a token of it; -1 for a policy without weights."""
        return min((v for v in self.versions if v >= 0), default=self.weight_version)

    @property
    def tool_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for turn in self.turns:
            for call in turn.calls:
                counts[call["name"]] = counts.get(call["name"], 0) + 1
        return counts

    def turn_of_ids(self) -> list[int]:
        """For each id, the turn that the policy wrote it in; -1 where the environment wrote."""
        found, turn, last = [], -1, ENVIRONMENT
        for author in self.author:
            turn += author != ENVIRONMENT and last == ENVIRONMENT
            found.append(-1 if author == ENVIRONMENT else turn)
            last = author
        return found

    def add(
        self,
        ids: list[int],
        author: int,
        logprobs: list[float] | None = None,
        versions: list[int] | None = None,
    ) -> None:
        """Append tokens of one author."""
        self.ids += ids
        self.author += [author] * len(ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)
        self.versions += versions if versions is not None else [-1] * len(ids)


def to_record(trajectory: Trajectory) -> dict[str, Any]:
    """The JSON form, one line of a trajectory file."""
    return {**asdict(trajectory), "tool_counts": trajectory.tool_counts}


def save(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Write a whole file of trajectories, atomically."""
    write_jsonl(path, map(to_record, trajectories))


def load(path: Path) -> list[Trajectory]:
    """Read trajectories back; `InputError` names the file and line of a bad record."""
    return [from_record(r, f"{path}:{number}") for number, r in enumerate(read_jsonl(path), 1)]


def from_record(record: dict[str, Any], where: str) -> Trajectory:
    """A trajectory from its JSON form; `InputError` says `where` a bad one is."""
    names = {f.name for f in fields(Trajectory)}
    try:
        record = {key: value for key, value in record.items() if key in names}
        record["turns"] = [Turn(**turn) for turn in record["turns"]]
        trajectory = Trajectory(**record)
        lengths = {len(trajectory.ids), len(trajectory.author), len(trajectory.logprobs)}
        if trajectory.versions:
            lengths.add(len(trajectory.versions))
        if len(lengths) != 1:
            raise ValueError("ids, author, logprobs and versions differ in length")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: not a trajectory: {error}") from None
    return trajectory


class Stored(Sequence[Trajectory]):
    """The trajectories of a file, each read and checked, as `load` does, when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self._ends = path, [0]
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._ends.append(self._ends[-1] + len(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, at: int) -> Trajectory: ...
    @overload
    def __getitem__(self, at: slice) -> list[Trajectory]: ...
    def __getitem__(self, at: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        with self._path.open("rb") as file:
            file.seek(self._ends[number])
            line = file.readline()
        record = read_record(line, self._path, number + 1)
        return from_record(record, f"{self._path}:{number + 1}")
