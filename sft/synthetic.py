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
from sandbox.agent_tools import ToolCall
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
# Share of examples that are excerpts, which hold more edits for their length.
EXCERPT_SHARE = 0.9


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
        """An excerpt with up to six bugs, or an episode with up to three bugs mended in one turn,
        or an episode with one bug, perhaps after wrong tries.

        Several bugs give several answers to learn from for one reading of the code; their order is
        random, so that the first answer is any of them.
        """
        (function,) = self._random.choices(self._pool, cum_weights=self._weights)
        excerpt = self._random.random() < EXCERPT_SHARE
        count = self._random.choice((1, 2, 3, 4, 5, 6) if excerpt else (1, 1, 1, 2, 3))
        bugs = self._pick(function.mendable, count)
        lines = list(_dedent(function.lines))
        margin = " " * (len(function.lines[0]) - len(lines[0]))
        for bug in bugs:
            lines[bug.line - 1] = bug.new
        shown = [margin * bool(line) + line for line in lines]
        calls = [edit_call(shown, bug.line, margin + bug.old) for bug in bugs]
        if excerpt:
            return self._excerpt(function, shown, calls)
        wrong = self._wrong(margin, lines, shown, calls[0]) if len(bugs) == 1 else []
        return self._episode(function, shown, bugs[0].line, calls, wrong)

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

    def _excerpt(self, function: Function, shown: list[str], calls: list[ToolCall]) -> Example:
        render = self._renderer
        parts = _Parts(self._random)
        parts.add(render.observation([_numbered(function, shown)]), CODE_SHARE, CODE_WEIGHT)
        parts.add(render.reply([*calls, RUN]))
        self._review(parts, function)
        return parts.example()

    def _episode(
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
        count = self._random.randint(1, 20)
        failure = self._failure(function, shown, bug_line, test, count)
        parts = _Parts(self._random)
        parts.add(prompt, 0.0)
        parts.add(render.reply([RUN, VIEW]))
        code = _numbered(function, shown)
        parts.add(render.observation([failure, code]), CODE_SHARE, CODE_WEIGHT)
        tries = [([call], 0.0) for call in wrong] + [(calls, 1.0)]
        for i, (edits, share) in enumerate(tries):
            if i:
                edits = [ToolCall(c.name, {**c.arguments, "undo": True}) for c in edits]
            parts.add(render.reply([*edits, RUN]), share)
            passed = i == len(tries) - 1
            outcome = f"all {count} tests pass" if passed else "still failing, same errors"
            parts.add(render.observation(["edited"] * len(edits) + [outcome]), 0.0)
        self._review(parts, function)
        parts.add(render.reply([SUBMIT]))
        return parts.example()

    def _review(self, parts: _Parts, function: Function) -> None:
        """Perhaps another look at the function, repaired."""
        if self._random.random() < REVIEW_SHARE:
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
