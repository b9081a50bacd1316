"""The teacher's episodes as the examples of SFT, each made when a batch wants it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from configs.errors import InputError
from model.hosts import agree, host_count, host_index
from sft.filters import FilterConfig, HeldOut, likeness, reason
from sft.packing import Example
from sft.trajectory import POLICY, Trajectory

Weigh = Literal["token", "turn", "episode"]
_ROUND = 50_000  # trajectories that hosts tell each other of at a time


@dataclass(frozen=True)
class _Kept:
    number: int
    task: str
    size: tuple[int, int]


class Examples(Sequence[Example]):
    """Every token of the episodes that pass the filters, with loss on what their policy wrote, less
    the turns whose edits it took back later.

    A search has many wrong guesses for each right one. As context they show what to do after a
    wrong guess; as targets they would teach to guess wrong.

    sizes: of each, as of ``Example.size``. Every host knows all of them though it has only looked
      at its part of the trajectories; of the others it reads what its own rows need. All hosts
      make this together.
    dropped: how many trajectories are left out, by reason.

    Args:
      weigh: what weighs 1 in the loss: a "token", or a whole "turn" or "episode" whatever its
        length.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        keep: FilterConfig | None = None,
        heldout: HeldOut | None = None,
        weigh: Weigh = "token",
    ) -> None:
        keep = keep or FilterConfig()
        self._trajectories, self._weigh = trajectories, weigh
        self._kept: list[_Kept] = []
        self.dropped: Counter[str] = Counter()
        seen: set[str] = set()
        for start in range(0, len(trajectories), _ROUND):
            end = min(start + _ROUND, len(trajectories))
            own = []
            for number in range(start + host_index(), end, host_count()):
                trajectory = trajectories[number]
                why = reason(keep, trajectory, heldout)
                size = (0, 0) if why else self._example(trajectory).size
                alike = likeness(trajectory) if keep.duplicates and not why else ""
                own.append((number, why, alike, trajectory.task, *size))
            found = sorted(tuple(entry) for host in agree(own) for entry in host)
            for number, why, alike, task, tokens, targets in found:
                why = why or ("has the patch of another" if alike and alike in seen else "")
                seen.add(alike)
                if why:
                    self.dropped[why] += 1
                else:
                    self._kept.append(_Kept(number, task, (tokens, targets)))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [kept.size for kept in self._kept]

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """(to learn from, to hold back): whole tasks, `share` of them and at least one of each,
        drawn by `seed` and the names alone. Raises InputError where there is but one task."""
        tasks = {kept.task for kept in self._kept}
        if share and len(tasks) == 1:
            raise InputError(
                f"all that there is to learn from is of one task, {tasks.pop()}: with "
                "sft.validation.share it would be held back; set that to 0, or teach more tasks"
            )

        def draw(task: str) -> bytes:
            return hashlib.sha256(f"{seed}\0{task}".encode("utf-8", "surrogatepass")).digest()

        count = min(max(1, round(share * len(tasks))), len(tasks) - 1) if share and tasks else 0
        held = set(sorted(tasks, key=draw)[:count])
        return self._only(tasks - held), self._only(held)

    def _only(self, tasks: set[str]) -> Examples:
        part = Examples([], weigh=self._weigh)
        part._trajectories, part.dropped = self._trajectories, self.dropped
        part._kept = [kept for kept in self._kept if kept.task in tasks]
        return part

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self._example(self._trajectories[kept.number]) for kept in self._kept[at]]
        return self._example(self._trajectories[self._kept[at].number])

    def weighted(self) -> Iterator[tuple[Trajectory, list[float]]]:
        """The trajectories behind the examples, each with the weights of its tokens."""
        for kept in self._kept:
            trajectory = self._trajectories[kept.number]
            yield trajectory, weights(trajectory, self._weigh)

    def _example(self, trajectory: Trajectory) -> Example:
        return Example(trajectory.ids, weights(trajectory, self._weigh))


def weights(trajectory: Trajectory, weigh: Weigh = "token") -> list[float]:
    """For each id its weight in the loss: 0 but where the policy wrote it in a turn that stood."""
    edits = [[c for c in turn.calls if c["name"] == "edit"] for turn in trajectory.turns]
    undo = [i for i, calls in enumerate(edits) if any(c["arguments"].get("undo") for c in calls)]
    undone = {i for i in range(max(undo, default=0)) if edits[i]}
    turns = trajectory.turn_of_ids()
    found = [
        float(author == POLICY and turn not in undone)
        for author, turn in zip(trajectory.author, turns, strict=True)
    ]
    if weigh == "token":
        return found
    group = turns if weigh == "turn" else [0] * len(turns)
    tokens = Counter(g for g, weight in zip(group, found, strict=True) if weight)
    return [weight and weight / tokens[g] for g, weight in zip(group, found, strict=True)]
