"""Which of the teacher's episodes SFT learns from; those that it does not, and why, are counted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.errors import InputError
from sandbox.mutate import functions
from sandbox.task import Task
from sft.trajectory import Trajectory

WINDOW = 6  # lines that follow one another; a shorter function counts whole
MIN_LINES, MIN_CHARS = 3, 80  # less than this is what any two programs share
_WIDTH = 120  # of a line that is compared: tools cut long ones
_NUMBERED = re.compile(r"^\s*\d+ ?")  # as `view` and `search` show lines
_MARK = re.compile(r"[-+ ]")


@dataclass(frozen=True)
class FilterConfig:
    """Beside the verdict, which must be a pass. 0 or None: no limit.

    Attributes:
      duplicates: drop an episode whose patch an earlier one of the same task has.
      heldout: drop what shows a held-out task: lines of its function (code), or those and whatever
        is of its package (package); or do not look (no).
      max_tokens, max_turns: of an episode.
      max_errors: observations that told the teacher of a mistake of its own.
      submitted: only episodes that ended by `submit`.
    """

    duplicates: bool = True
    heldout: Literal["no", "code", "package"] = "code"
    max_tokens: int = 0
    max_turns: int = 0
    max_errors: int | None = None
    submitted: bool = False


class HeldOut:
    """What held-out tasks look like: fingerprints of their functions, and their packages.

    A fingerprint is a hash of WINDOW lines of code that follow one another, less blanks and
    comments, of the function with its bug and without (n-gram overlap, as in Brown et al., arXiv
    2005.14165, appendix C; by lines, since tools show lines).
    """

    def __init__(self, tasks: Sequence[Task], *, packages: bool = False) -> None:
        self.packages = {task.package for task in tasks} if packages else set()
        self.prints: set[bytes] = set()
        self._sizes: set[int] = set()
        for task in tasks:
            tree = task.tree()
            pristine = tree.root / task.module
            for data in (tree.overlay.get(task.module), pristine.read_bytes()):
                lines = _function(data or b"", task.function)
                size = min(WINDOW, len(lines))
                if size >= MIN_LINES:
                    self._sizes.add(size)
                    self.prints.update(_prints(lines, size))

    def shown_in(self, trajectory: Trajectory) -> bool:
        """Whether an episode is of a held-out package, or its text holds a fingerprint."""
        if trajectory.package in self.packages:
            return True
        return any(
            found in self.prints
            for lines in _pieces(trajectory)
            for size in self._sizes
            for found in _prints(lines, size)
        )


def reason(config: FilterConfig, trajectory: Trajectory, heldout: HeldOut | None) -> str:
    """Why an episode is dropped, looked at alone; "" if it is kept."""
    if not trajectory.success:
        return "not verified"
    if config.submitted and trajectory.stop != "submit":
        return "not submitted"
    if config.max_tokens and len(trajectory.ids) > config.max_tokens:
        return "too many tokens"
    if config.max_turns and len(trajectory.turns) > config.max_turns:
        return "too many turns"
    if config.max_errors is not None:
        seen = [text for turn in trajectory.turns for text in turn.observations]
        if sum(text.startswith("error: ") for text in seen) > config.max_errors:
            return "too many errors"
    if heldout is not None and heldout.shown_in(trajectory):
        return "shows a held-out task"
    return ""


def likeness(trajectory: Trajectory) -> str:
    """The same for episodes of one task with one patch; "" without a patch."""
    if not trajectory.patch:
        return ""
    text = f"{trajectory.task}\0{trajectory.patch}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _function(data: bytes, name: str) -> list[str]:
    """The lines of a function, as they are compared; none where it cannot be told apart."""
    source = data.decode("utf-8", "replace")
    try:
        span = next((s for s in functions(source) if s.name == name), None)
    except InputError:
        return []
    return _plain(source.split("\n")[span.line - 1 : span.end_line]) if span else []


def _plain(lines: Iterable[str]) -> list[str]:
    stripped = (line.strip()[:_WIDTH] for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def _prints(lines: Sequence[str], size: int) -> Iterator[bytes]:
    for start in range(len(lines) - size + 1):
        text = "\n".join(lines[start : start + size])
        if len(text) >= MIN_CHARS:
            yield hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()


def _pieces(trajectory: Trajectory) -> Iterator[list[str]]:
    """All code that an episode shows, piece by piece."""
    for turn in trajectory.turns:
        for text in turn.observations:
            yield _plain(_NUMBERED.sub("", line, count=1) for line in text.split("\n"))
        for call in turn.calls:
            for value in call["arguments"].values():
                if isinstance(value, str):
                    yield _plain(value.split("\n"))
    for side in "-+":  # the code before and after
        lines = [line for line in trajectory.patch.split("\n") if not line.startswith(side)]
        yield _plain(_MARK.sub("", line, count=1) for line in lines)
