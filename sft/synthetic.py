"""Pre-training text: real functions with procedural bugs, as short repair episodes.

Nothing is executed here. Each example is an episode in the agent's own format whose function comes
from a real source file and whose edits undo mutations that were just put in, so a small model can
learn the format, to copy, and what unlikely code looks like, at thousands of examples a second.
What test output means it learns later, from real episodes.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from configs.errors import InputError
from sandbox.agent_tools import ToolCall
from sandbox.mutate import Edit, functions, mutations
from sft.chat import Renderer
from sft.packing import Example
from sft.teacher import RUN, SUBMIT, VIEW, edit_call

MIN_LINES, MAX_LINES, MAX_CHARS = 4, 28, 1100
# Share of the code's own tokens that carry loss, and its weight: enough to learn what code looks
# like, and the vocabulary projection of the rest is saved.
CODE_SHARE, CODE_WEIGHT = 0.1, 0.5
# Share of episodes that end with a second look at the repaired function, all of it with loss. It is
# nearly a copy of the first look: nothing teaches a small model to copy as quickly, and without it
# the circuit of model/copying.py is lost again.
REVIEW_SHARE = 0.3


@dataclass(frozen=True)
class Function:
    """A function as the agent's view shows it, with every single-line bug it may get."""

    module: str
    name: str
    line: int
    lines: tuple[str, ...]
    bugs: tuple[Edit, ...]  # lines counted from 1 inside the function


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


def _dedent(lines: Sequence[str]) -> list[str]:
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[margin:] for line in lines]


class RepairEpisodes:
    """An endless, seeded stream of pre-training examples over `pool`."""

    def __init__(self, pool: Sequence[Function], renderer: Renderer, seed: int) -> None:
        self._pool, self._renderer = pool, renderer
        # short functions more often: more answers to learn from for the same reading
        self._weights = list(accumulate(1.0 / (100 + sum(map(len, f.lines))) for f in pool))
        self._random = random.Random(seed)

    def example(self) -> Example:
        """One episode: up to four bugs mended in one turn, or one bug, perhaps after wrong tries.

        Several bugs give several answers to learn from for one reading of the code; their order is
        random, so that the first answer is any of them.
        """
        (function,) = self._random.choices(self._pool, cum_weights=self._weights)
        bugs = self._pick(function.bugs, self._random.choice((1, 1, 2, 3, 4)))
        lines = list(_dedent(function.lines))
        margin = " " * (len(function.lines[0]) - len(lines[0]))
        for bug in bugs:
            lines[bug.line - 1] = bug.new
        shown = [margin * bool(line) + line for line in lines]
        calls = [edit_call(shown, bug.line, margin * bool(bug.old) + bug.old) for bug in bugs]
        wrong = self._wrong(margin, lines, shown, calls[0]) if len(bugs) == 1 else []
        return self._render(function, shown, bugs[0].line, calls, wrong)

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

    def _wrong(
        self, margin: str, lines: list[str], shown: list[str], right: ToolCall
    ) -> list[ToolCall]:
        """Edits that a searcher might try first, in vain."""
        count = self._random.choice((0, 0, 0, 1, 2, 3, 4))
        if not count:
            return []
        try:
            edits = mutations("\n".join(lines) + "\n")
        except InputError:
            return []
        calls: list[ToolCall] = []
        for _ in range(count if edits else 0):
            edit = self._pick(edits, 1)[0]
            call = edit_call(shown, edit.line, margin + edit.new)
            if call not in calls and call != right:
                calls.append(call)
        return calls

    def _render(
        self,
        function: Function,
        shown: list[str],
        bug_line: int,
        calls: list[ToolCall],
        wrong: list[ToolCall],
    ) -> Example:
        render = self._renderer
        short = function.name.rsplit(".", 1)[-1].strip("_")
        stem = function.module.rsplit("/", 1)[-1].removesuffix(".py").strip("_")
        test = f"tests/test_{stem}.py::test_{short}"
        prompt = render.prompt(
            f"Tests fail because of a bug in `{function.name}` in `{function.module}`.\n"
            f"Failing: {test}\nFix the source; do not change the tests."
        )
        code = "\n".join(f"{n} {text}" for n, text in enumerate(shown, function.line))
        count = self._random.randint(1, 20)
        failure = self._failure(function, shown, bug_line, test, count)
        ids: list[int] = []
        weight: list[float] = []

        def add(new: list[int], share: float, loss: float = 1.0) -> None:
            ids.extend(new)
            weight.extend(loss * (self._random.random() < share) for _ in new)

        add(prompt, 0.0)
        add(render.reply([RUN, VIEW]), 1.0)
        add(render.observation([failure, code]), CODE_SHARE, CODE_WEIGHT)
        tries = [([call], 0.0) for call in wrong] + [(calls, 1.0)]
        for i, (edits, w) in enumerate(tries):
            if i:
                edits = [ToolCall(c.name, {**c.arguments, "undo": True}) for c in edits]
            add(render.reply([*edits, RUN]), w)
            passed = i == len(tries) - 1
            outcome = f"all {count} tests pass" if passed else "still failing, same errors"
            add(render.observation(["edited"] * len(edits) + [outcome]), 0.0)
        if self._random.random() < REVIEW_SHARE:
            add(render.reply([VIEW]), 0.0)
            fixed = "\n".join(f"{n} {text}" for n, text in enumerate(function.lines, function.line))
            add(render.observation([fixed]), 1.0)
        add(render.reply([SUBMIT]), 1.0)
        return Example(ids, weight)

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


def corpus_texts(pool: Iterable[Function]) -> Iterator[str]:
    """The texts a tokenizer is trained on: numbered code, as the model sees it."""
    for function in pool:
        yield "\n".join(f"{n} {text}" for n, text in enumerate(function.lines, function.line))
