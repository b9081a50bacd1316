"""Pre-training text: real functions with procedural bugs, as short repair episodes.

Nothing is executed here. Each example is an episode in the agent's own format whose function comes
from a real source file and whose edits undo mutations that were just put in, so a small model can
learn the format, to copy, and what unlikely code looks like, at thousands of examples a second.
Most are excerpts: a view with many bugs and the edits that mend them, without the conversation
around them. What test output means it learns later, from real episodes.
"""

from __future__ import annotations

import ast
import keyword
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from configs.errors import InputError
from sandbox.agent_tools import EDITED, STILL_FAILING, ToolCall, occurrences
from sandbox.mutate import REVERSIBLE, Edit, functions, mutations
from sft.chat import Renderer
from sft.packing import Example
from sft.teacher import RUN, SUBMIT, VIEW, edit_call

_WORD = re.compile(r"\w+")
_KEYWORDS = frozenset(keyword.kwlist) | {"0", "1"}
MIN_LINES, MAX_LINES, MAX_CHARS = 4, 28, 1100
# Share of the code's own tokens that carry loss, and its weight: enough to learn what code looks
# like, and the vocabulary projection of the rest is saved.
CODE_SHARE, CODE_WEIGHT = 0.1, 0.5
# Share of examples that end with a second look at the repaired function, all of it with loss. It is
# nearly a copy of the first look: dense practice in copying, which edits alone are not.
REVIEW_SHARE = 0.15


@dataclass(frozen=True)
class Function:
    """A function as the agent's view shows it, with every single-line bug it may get."""

    module: str
    name: str
    line: int
    lines: tuple[str, ...]
    bugs: tuple[Edit, ...]  # lines counted from 1 inside the function

    @cached_property
    def mendable(self) -> tuple[Edit, ...]:
        """The bugs whose repair can be guessed from what is left; all, if there are none.

        What an irreversible mutation took away (`return f(x)` for `return None`) may be in no other
        place of the function: learning to guess that would only be noise.
        """
        counts = Counter(word for line in self.lines for word in _WORD.findall(line))
        kept = []
        for bug in self.bugs:
            lost = Counter(_WORD.findall(bug.old))
            lost.subtract(_WORD.findall(bug.new))
            known = all(word in _KEYWORDS or counts[word] > n for word, n in lost.items() if n > 0)
            if bug.operator in REVERSIBLE or (known and len(bug.old) - len(bug.new) <= 24):
                kept.append(bug)
        return tuple(kept) or self.bugs


def extract(module: str, source: str) -> Iterator[Function]:
    """Every function of `source` that fits the small model's window and can be mutated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
        spans = functions(source)
    except (InputError, SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for span in spans:
        body = lines[span.line - 1 : span.end_line]
        if not MIN_LINES <= len(body) <= MAX_LINES or sum(map(len, body)) > MAX_CHARS:
            continue
        if any("\t" in line or not line.isascii() for line in body):
            continue
        try:
            edits = mutations("\n".join(_dedent(body)) + "\n")
        except InputError:
            continue
        if edits:
            yield Function(module, span.name, span.line, tuple(body), tuple(edits))


def _broken(function: Function, bugs: Sequence[Edit]) -> tuple[list[str], str]:
    """The function's lines with `bugs` in them, and the margin that its bugs' lines lack."""
    lines = _dedent(function.lines)
    margin = " " * (len(function.lines[0]) - len(lines[0]))
    for bug in bugs:
        lines[bug.line - 1] = bug.new
    return [margin * bool(line) + line for line in lines], margin


def _dedent(lines: Sequence[str]) -> list[str]:
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[margin:] for line in lines]


@dataclass(frozen=True)
class MixConfig:
    """Shares of pre-training examples by form; the rest are excerpts.

    Attributes:
      tries: one edit a turn, each with its test run, until the tests pass.
      prompted: of the tries, those with the task's prompt and a first failure in front.
      slips: of the edits of a try, those that follow one which the tools refused.
      changed: of the failing runs, those that fail otherwise than before.
      joined: of the tries, those that stand in one turn with the one before.
    """

    tries: float = 0.1
    prompted: float = 1.0
    slips: float = 0.0
    changed: float = 0.25
    joined: float = 0.0


class RepairEpisodes:
    """An endless, seeded stream of pre-training examples over `pool`.

    An example has up to six bugs, on different lines of one function, and an edit for each, in
    random order: several answers to learn from for one reading of the code. An excerpt mends them
    all in one turn, and holds the most edits for its length. Tries mend one after the other, with a
    test run and mostly a turn for each, and take back the one before, as someone does who looks for
    the one bug that the tests see: what an agent meets, but no try is a bad guess, and none comes
    twice.
    """

    def __init__(
        self, pool: Sequence[Function], renderer: Renderer, seed: int, mix: MixConfig
    ) -> None:
        self._pool, self._renderer, self._mix = pool, renderer, mix
        # short functions more often: more answers to learn from for the same reading
        self._weights = list(accumulate(1.0 / (100 + sum(map(len, f.lines))) for f in pool))
        self._random = random.Random(seed)

    def example(self) -> Example:
        """The next example."""
        function = self._draw()
        bugs = self._pick(function.mendable, self._random.randint(1, 6))
        shown, margin = _broken(function, bugs)
        tries = self._chance(self._mix.tries)
        calls = [
            edit_call(shown, bug.line, margin + bug.old, undo=tries and i > 0)
            for i, bug in enumerate(bugs)
        ]
        if not tries:
            return self._excerpt(function, shown, calls)
        return self._tries(function, shown, [bug.line for bug in bugs], calls)

    def _draw(self) -> Function:
        return self._random.choices(self._pool, cum_weights=self._weights)[0]

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _pick(self, bugs: Sequence[Edit], count: int) -> list[Edit]:
        """Bugs on different lines, kinds of bug equally likely, in random order."""
        kinds: dict[str, list[Edit]] = defaultdict(list)
        for bug in bugs:
            kinds[bug.operator].append(bug)
        chosen: dict[int, Edit] = {}
        for _ in range(count):
            bug = self._random.choice(kinds[self._random.choice(sorted(kinds))])
            chosen.setdefault(bug.line, bug)
        return list(chosen.values())

    def _excerpt(self, function: Function, shown: list[str], calls: list[ToolCall]) -> Example:
        parts = _Parts(self._random)
        view = _numbered(function, shown)
        parts.add(self._renderer.observation([view]), CODE_SHARE, CODE_WEIGHT)
        parts.add(self._renderer.reply([*calls, RUN]))
        self._review(parts, function)
        return parts.example()

    def _tries(
        self, function: Function, shown: list[str], bug_lines: list[int], calls: list[ToolCall]
    ) -> Example:
        render = self._renderer
        short = function.name.rsplit(".", 1)[-1].strip("_")
        stem = function.module.rsplit("/", 1)[-1].removesuffix(".py").strip("_")
        test = f"tests/test_{stem}.py::test_{short}"
        count = self._random.randint(1, 20)
        # the tests see the bug that try `repair` mends; what its turn holds behind it is not run
        turns = self._turns(list(zip(calls, bug_lines, strict=True)))
        repair = sum(map(len, turns[:-1])) + self._random.randrange(len(turns[-1]))
        parts = _Parts(self._random)
        seen = [_numbered(function, shown)]
        if self._chance(self._mix.prompted):
            prompt = render.prompt(
                f"Tests fail because of a bug in `{function.name}` in `{function.module}`.\n"
                f"Failing: {test}\nFix the source; do not change the tests."
            )
            parts.add(prompt, 0.0)
            parts.add(render.reply([RUN, VIEW]))
            seen.insert(0, self._failure(function, shown, bug_lines[repair], test, count))
        parts.add(render.observation(seen), CODE_SHARE, CODE_WEIGHT)
        done = 0
        for turn in turns:
            if self._chance(self._mix.slips):
                slip, refusal = self._slip(function, shown, undo=done > 0)
                parts.add(render.reply([slip, RUN]), 0.0)
                parts.add(render.observation([refusal, STILL_FAILING]), 0.0)
                again = ToolCall("edit", {**turn[0][0].arguments, "undo": True})
                turn[0] = again, turn[0][1]
            parts.add(render.reply([call for edit, _ in turn for call in (edit, RUN)]))
            answers: list[str] = []
            for _, line in turn[: repair + 1 - done]:
                answers += [EDITED, STILL_FAILING]
                if self._chance(self._mix.changed):
                    answers[-1] = self._failure(function, shown, line, test, count)
            done += len(turn)
            if done > repair:
                answers[-1] = f"all {count} tests pass"
            parts.add(render.observation(answers), 0.0)
        self._review(parts, function)
        parts.add(render.reply([SUBMIT]))
        return parts.example()

    def _turns(self, tries: list[tuple[ToolCall, int]]) -> list[list[tuple[ToolCall, int]]]:
        """Tries, each with its line, by turn."""
        turns = [tries[:1]]
        for one in tries[1:]:
            if self._chance(self._mix.joined):
                turns[-1].append(one)
            else:
                turns.append([one])
        return turns

    def _slip(self, function: Function, shown: list[str], undo: bool) -> tuple[ToolCall, str]:
        """An edit that the tools refuse, and what they answer."""
        text = "\n".join(shown)
        words = sorted(set(_WORD.findall(text)))
        foreign = self._draw()
        (bug,) = self._pick(foreign.mendable, 1)
        strange, margin = _broken(foreign, [bug])
        arguments = dict(edit_call(strange, bug.line, margin + bug.old, undo=undo).arguments)
        match self._random.choice(("absent", "absent", "absent", "repeated", "same")):
            case "repeated":
                arguments["old"] = max(words, key=lambda word: len(occurrences(text, word)))
            case "same":
                arguments["old"] = self._random.choice(words)
                arguments["new"] = arguments["old"]
        found = len(occurrences(text, arguments["old"]))
        if found == 1:
            arguments["new"] = arguments["old"]
        if arguments["old"] == arguments["new"]:
            error = "old and new are the same"
        else:
            error = f"old occurs {found} times in {function.name}"
        return ToolCall("edit", arguments), f"error: {error}"

    def _review(self, parts: _Parts, function: Function) -> None:
        """Perhaps another look at the function, repaired."""
        if self._chance(REVIEW_SHARE):
            parts.add(self._renderer.reply([VIEW]), 0.0)
            parts.add(self._renderer.observation([_numbered(function, function.lines)]))

    def _failure(
        self, function: Function, shown: list[str], bug_line: int, test: str, count: int
    ) -> str:
        """Test output of the right form; half the time with a traceback at or after the bug."""
        draw = self._random
        file, _, name = test.partition("::")
        called = function.name.rsplit(".", 1)[-1]
        lines = [
            f"{draw.randint(1, count)} of {count} tests fail",
            f"{file}:{draw.randint(5, 400)} {name}: assert {called}(value) == expected",
        ]
        if draw.random() < 0.5:
            at = draw.choice((bug_line, draw.randint(bug_line, len(shown))))
            number = function.line + at - 1
            lines.append(f"{function.module}:{number} {function.name}: {shown[at - 1].strip()}")
            lines.append(draw.choice(("TypeError: ", "ValueError: ", "KeyError: ", "IndexError: ")))
        else:
            lines.append("AssertionError: assert ")
        return "\n".join(lines)


class _Parts:
    """An example that grows piece by piece."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._ids: list[int] = []
        self._weight: list[float] = []

    def add(self, ids: Sequence[int], share: float = 1.0, loss: float = 1.0) -> None:
        """Append `ids`; a random `share` of them carries this much loss."""
        self._ids.extend(ids)
        self._weight.extend(loss * (self._draw.random() < share) for _ in ids)

    def example(self) -> Example:
        return Example(self._ids, self._weight)


def _numbered(function: Function, lines: Sequence[str]) -> str:
    """Lines of the function as the agent's view shows them."""
    return "\n".join(f"{n} {text}" for n, text in enumerate(lines, function.line))


def corpus_texts(pool: Iterable[Function]) -> Iterator[str]:
    """The texts a tokenizer is trained on: numbered code, as the model sees it."""
    for function in pool:
        yield _numbered(function, function.lines)
