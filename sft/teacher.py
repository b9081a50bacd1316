"""An offline teacher: a generate-and-validate repairer that needs no model and no gold patch.

It works through the agent's own tools and reads only what they return. It runs the tests, views the
suspect function, and then tries one candidate edit after another, running the tests after each,
until they pass or the episode's turns are over. Candidates are single mutations of the code on
view, in the tradition of template-based repair (Debroy & Wong, "Using Mutation to Automatically
Suggest Fixes for Faulty Programs", ICST 2010).
"""

from __future__ import annotations

import math
import random
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from os.path import commonprefix

from configs.errors import InputError
from sandbox.agent_tools import ToolCall, occurrences
from sandbox.mutate import Edit, mutations

# A line named by the traceback is this much likelier to be tried before another one.
TRACEBACK_BOOST = 4.0

_SUSPECT = re.compile(r"`[^`]+` in `(?P<module>[^`]+)`")
_NUMBERED = re.compile(r"(\d+) ?(.*)")
# A name or number with the one character before it, or a run of punctuation: cut like this, pieces
# of a line are mostly whole tokens, in the line and in the edit that quotes them.
_PIECE = re.compile(r"[^\w\n]?[^\W\d]\w*|\W?\d+| ?[^\s\w]+|\s+")
RUN = ToolCall("run_tests", {})
VIEW = ToolCall("view", {})
SUBMIT = ToolCall("submit", {})


class SearchTeacher:
    """One episode of the teacher. `act` maps the newest texts to the next calls.

    Candidates are drawn without replacement, uniformly over kinds of mutation and then over the
    candidates of a kind, lines named by the traceback first more often. The seed decides the order.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._module = ""
        self._candidates: list[ToolCall] | None = None
        self._tried = 0

    def act(self, texts: Sequence[str]) -> list[ToolCall]:
        """The next calls, given the instruction (first) or the observations of the last calls."""
        if not self._module:
            suspect = _SUSPECT.search(texts[0])
            if suspect is None:
                return [SUBMIT]
            self._module = suspect["module"]
            return [RUN, VIEW]
        if texts[-1].startswith("all "):
            return [SUBMIT]
        if self._candidates is None:
            self._candidates = self._rank(failure=texts[0], view=texts[1])
        if self._tried == len(self._candidates):
            return [SUBMIT]
        self._tried += 1
        return [self._candidates[self._tried - 1], RUN]

    def _rank(self, failure: str, view: str) -> list[ToolCall]:
        """Every candidate edit of the function on view, in the order they will be tried."""
        numbers, lines = [], []
        for numbered in view.splitlines():
            if match := _NUMBERED.fullmatch(numbered):
                numbers.append(int(match[1]))
                lines.append(match[2])
        source = textwrap.dedent("\n".join(lines)) + "\n"
        margin = " " * (len(lines[0]) - len(source.split("\n")[0])) if lines else ""
        try:
            edits = [e for e in mutations(source) if e.line == e.end_line]
        except InputError:  # the view was cut: nothing to work on
            return []
        frames = re.escape(self._module) + r":(\d+) "
        hot = {int(n) for n in re.findall(frames, failure)}
        kinds = Counter(edit.operator for edit in edits)

        def key(edit: Edit) -> float:
            weight = 1.0 / kinds[edit.operator]
            if numbers[edit.line - 1] in hot:
                weight *= TRACEBACK_BOOST
            # exponential race (Efraimidis & Spirakis 2006): sorted keys are a weighted shuffle
            return -math.log(1.0 - self._random.random()) / weight

        calls: list[ToolCall] = []
        for edit in sorted(edits, key=key):
            calls.append(edit_call(lines, edit.line, margin + edit.new, undo=bool(calls)))
        return calls


def edit_call(lines: Sequence[str], line: int, new: str, *, undo: bool = False) -> ToolCall:
    """The smallest `edit` that turns line number `line` (from 1) of a function into `new`.

    It quotes whole names and operators, and as many as make it unambiguous in the function: first
    those behind the change, then those before it, then lines above and below.
    """
    text = "\n".join(lines)
    before, after = _PIECE.findall(lines[line - 1]), _PIECE.findall(new)
    start = len(commonprefix([before, after]))
    rest = before[start:], after[start:]
    end = len(before) - len(commonprefix([side[::-1] for side in rest]))
    shift = len(after) - len(before)
    first, last = line - 1, line  # the whole lines quoted are those from first to last, less line
    lead = trail = ""
    while start == end or len(occurrences(text, f"{lead}{''.join(before[start:end])}{trail}")) > 1:
        if end < len(before):
            end += 1
        elif start:
            start -= 1
        elif first:
            first -= 1
            lead = f"{lines[first]}\n{lead}"
        else:
            trail += f"\n{lines[last]}"
            last += 1
    arguments = {
        "old": f"{lead}{''.join(before[start:end])}{trail}",
        "new": f"{lead}{''.join(after[start : end + shift])}{trail}",
    }
    return ToolCall("edit", arguments | ({"undo": True} if undo else {}))
