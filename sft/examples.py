"""Verified trajectories as the examples of SFT, each made when a batch wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from model.hosts import agree, host_count, host_index
from sft.packing import Example
from sft.trajectory import POLICY, Trajectory

_ROUND = 50_000  # trajectories that hosts tell each other of at a time


class Examples(Sequence[Example]):
    """Every token of the verified trajectories, with loss on what their policy wrote, less the
    turns whose edits it took back later.

    A search has many wrong guesses for each right one. As context they show what to do after a
    wrong guess; as targets they would teach to guess wrong.

    sizes: of each, as of ``Example.size``. Every host knows all of them though it has only looked
      at its part of the trajectories; of the others it reads what its own rows need. All hosts
      make this together.
    """

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        found: list[tuple[int, int, int]] = []
        for start in range(0, len(trajectories), _ROUND):
            end = min(start + _ROUND, len(trajectories))
            own = []
            for number in range(start + host_index(), end, host_count()):
                trajectory = trajectories[number]
                if trajectory.success:
                    own.append((number, *_example(trajectory).size))
            found += sorted(tuple(entry) for host in agree(own) for entry in host)
        self._trajectories = trajectories
        self._numbers = [number for number, _, _ in found]
        self.sizes = [(tokens, targets) for _, tokens, targets in found]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [_example(self._trajectories[number]) for number in self._numbers[at]]
        return _example(self._trajectories[self._numbers[at]])


def _example(trajectory: Trajectory) -> Example:
    return Example(trajectory.ids, _weights(trajectory))


def _weights(trajectory: Trajectory) -> list[float]:
    """For each id, 1 if the policy wrote it in a turn that stood, else 0."""
    edits = [[c for c in turn.calls if c["name"] == "edit"] for turn in trajectory.turns]
    undo = [i for i, calls in enumerate(edits) if any(c["arguments"].get("undo") for c in calls)]
    undone = {i for i in range(max(undo, default=0)) if edits[i]}
    turns = zip(trajectory.author, trajectory.turn_of_ids(), strict=True)
    return [float(author == POLICY and turn not in undone) for author, turn in turns]
