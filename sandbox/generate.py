"""Procedural tasks: put a small bug into a tested function, and keep it if tests notice.

For each package: measure which tests execute which functions, walk over the functions in a seeded
order, mutate each a few times with the operators that are rarest so far, and run the tests that
execute it. A bug is kept when some of them fail that pass on the release, every time, and quickly.
A function is left when as many mutations as are tried in one round have given nothing.
"""

from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from configs.errors import InputError
from sandbox.base import SandboxPool, Tree
from sandbox.coverage import Coverage, coverage
from sandbox.mutate import Edit, FunctionSpan, apply, can_be_undone, functions, mutations
from sandbox.packages import Package
from sandbox.shipped import Row, group, task_name
from sandbox.source import Code
from sandbox.trial import Trials

MIN_LINES, MAX_LINES, MAX_CHARS = 4, 28, 1100
MAX_TESTS_RUN, MAX_SECONDS_RUN, NEIGHBOURS = 40, 0.25, 4
MAX_ID_CHARS = 90
TOGETHER = 16  # functions whose tests are run together on the release
MAX_SLOW = 16  # functions whose tests are slow, and less others, before a package is given up


class TooSlow(InputError):
    """A package whose tests take too much time to make tasks from."""


@dataclass(frozen=True)
class Plan:
    """How much to make. `repeat` runs before and after prove each task; a mutation that the
    operators cannot undo is kept with probability `one_way`."""

    per_function: int = 4
    per_package: dict[str, int] = field(default_factory=lambda: {"train": 60, "heldout": 36})
    max_covering: int = 120
    attempts: int = 4
    repeat: int = 3
    one_way: float = 0.15
    seed: int = 0


@dataclass
class Target:
    """A function to be mutated, its mutations not yet tried, and the tests that execute it (none
    once it is given up)."""

    module: str
    span: FunctionSpan
    source: str
    edits: list[tuple[int, Edit]]
    tests: list[str]
    neighbours: list[str]
    lines: set[int] = field(default_factory=set)


async def generate(
    package: Package, plan: Plan, pool: SandboxPool, foreign: Collection[str] = frozenset()
) -> AsyncIterator[Row]:
    """Yield proven tasks of one package; its release must be in the cache.

    `foreign` holds fingerprints of functions that belong to the other split: they are left alone.
    Raises InputError where the tests cannot be run; TooSlow, maybe after some tasks, where most
    functions have slow tests.
    """
    measured = await coverage(package)
    rng = random.Random(f"{plan.seed}:{package.name}")
    targets = list(_targets(package, measured, plan, foreign))
    rng.shuffle(targets)
    used: Counter[str] = Counter()
    left = plan.per_package[package.split]
    quick = slow = 0
    async with pool.lease(Tree(package.tree, {}, package.python_path)) as sandbox:
        trials = Trials(package, sandbox, plan.repeat)
        for round in range(plan.per_function):
            for at, target in enumerate(targets):
                if round == 0 and at % TOGETHER == 0 and left > 0:
                    some = targets[at : at + TOGETHER]
                    good = await _prepare(some, trials, plan.repeat)
                    quick, slow = quick + good, slow + len(some) - good
                    if slow >= MAX_SLOW and slow > quick:
                        raise TooSlow(f"{package.name}: its tests take too long ({slow} functions)")
                for _ in range(plan.attempts if target.tests else 0):
                    if left <= 0:
                        return
                    choice = _choose(target, used, plan, rng)
                    if choice is None:
                        break
                    row = await _try(package, target, *choice, plan, trials)
                    target.lines.add(choice[1].line)
                    if row is not None:
                        used[row.operator] += 1
                        left -= 1
                        yield row
                        break
                else:
                    target.tests = []  # what they did not notice so often, they will not


def fingerprints(packages: Iterable[Package]) -> set[str]:
    """Fingerprints of every function in some packages: two alike are the same code, whatever its
    name, comments and layout."""
    sources = (source for package in packages for _, source in modules(package))
    return {print for source in sources for print in fingerprints_of(source).values()}


def modules(package: Package) -> Iterable[tuple[str, str]]:
    """Path and text of each source file of a package that is Python, in UTF-8, and no test."""
    for entry in package.source:
        root = package.tree / entry
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            module = path.relative_to(package.tree).as_posix()
            if any(module == test or module.startswith(f"{test}/") for test in package.tests):
                continue
            try:
                source = path.read_bytes().decode("utf-8")
                functions(source)
            except (UnicodeDecodeError, InputError):
                continue
            yield module, source


def fingerprints_of(source: str) -> dict[str, str]:
    """The fingerprint of each function that has a name of its own, by qualified name."""
    found, names = {}, Counter(span.name for span in functions(source))
    for span, node in Code(source).functions:
        body = node.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        text = ast.dump(node.args) + "".join(map(ast.dump, body))
        if names[span.name] == 1:
            found[span.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def _targets(
    package: Package, measured: Coverage, plan: Plan, foreign: Collection[str]
) -> Iterable[Target]:
    for module, source in modules(package):
        lines, known = source.split("\n"), fingerprints_of(source)
        covering = {
            span.name: [id for id in measured.tests.get((module, span.line), ()) if _plain(id)]
            for span in functions(source)
        }
        in_module = sorted({id for ids in covering.values() for id in ids})
        for span in functions(source):
            text = lines[span.line - 1 : span.end_line]
            fits = MIN_LINES <= len(text) <= MAX_LINES and len("\n".join(text)) <= MAX_CHARS
            tests = covering[span.name]
            if not fits or span.name not in known or "<locals>" in span.name:
                continue
            if known[span.name] in foreign or not 0 < len(tests) <= plan.max_covering:
                continue
            chosen = _quickest(tests, measured, MAX_TESTS_RUN, MAX_SECONDS_RUN)
            others = [id for id in in_module if id not in tests]
            near = _quickest(others, measured, NEIGHBOURS, 0.05)
            edits = list(enumerate(mutations(source, span.name)))
            if chosen and edits:
                yield Target(module, span, source, edits, chosen, near)


def _plain(id: str) -> bool:
    """An id that is short, readable and the same everywhere."""
    return len(id) <= MAX_ID_CHARS and id.isascii() and id.isprintable() and "0x" not in id


def _quickest(ids: Iterable[str], measured: Coverage, count: int, seconds: float) -> list[str]:
    """The quickest tests, first one of each parametrised test, then more, within a time."""
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, str]] = []
    for id in sorted(ids, key=lambda id: (measured.seconds[id], id)):
        base = id.partition("[")[0]
        ranked.append((seen[base], len(ranked), id))
        seen[base] += 1
    chosen: list[str] = []
    total = 0.0
    for _, _, id in sorted(ranked):
        if len(chosen) < count and total + measured.seconds[id] <= seconds:
            chosen.append(id)
            total += measured.seconds[id]
    return chosen


def _choose(
    target: Target, used: Counter[str], plan: Plan, rng: random.Random
) -> tuple[int, Edit] | None:
    """Take an untried mutation: of the operator used least, on a line not yet tried."""
    while target.edits:
        rank = {edit.operator: (used[edit.operator], rng.random()) for _, edit in target.edits}
        at = min(
            range(len(target.edits)),
            key=lambda i: (
                target.edits[i][1].line in target.lines,
                rank[target.edits[i][1].operator],
                rng.random(),
            ),
        )
        ordinal, edit = target.edits.pop(at)
        if can_be_undone(target.source, target.span, edit) or rng.random() < plan.one_way:
            return ordinal, edit
    return None


async def _prepare(targets: Sequence[Target], trials: Trials, repeat: int) -> int:
    """Leave each target the tests that are steady on the release, or none where they are slow.

    Returns how many targets were not slow."""
    quick = []
    for target in targets:
        if await _keep_steady(target, trials, 1):
            quick.append(target)
    every = {id for target in quick for id in target.tests + target.neighbours}
    await trials.rehearse(sorted(every))
    return sum([await _keep_steady(target, trials, repeat) for target in quick])


async def _keep_steady(target: Target, trials: Trials, times: int) -> bool:
    """Take out tests that were not seen to pass so often; all of them, and False, if slow."""
    steady = await trials.steady(target.tests + target.neighbours, times)
    good = frozenset(steady or ())
    target.tests = [id for id in target.tests if id in good]
    target.neighbours = [id for id in target.neighbours if id in good]
    return steady is not None


async def _try(
    package: Package, target: Target, ordinal: int, edit: Edit, plan: Plan, trials: Trials
) -> Row | None:
    """The task of one mutation, if it is a good one."""
    buggy = apply(target.source, edit).encode()
    proven = await trials.prove(target.module, buggy, target.tests, target.neighbours)
    if proven is None:
        return None
    digest = hashlib.sha256(buggy).hexdigest()
    return Row(
        name=task_name(package.name, target.span.name, edit.operator, digest),
        package=package.name,
        version=package.version,
        split=package.split,
        module=target.module,
        function=target.span.name,
        operator=edit.operator,
        ordinal=ordinal,
        sha256=digest,
        f2p=group(proven.fail_to_pass),
        p2p=group(proven.pass_to_pass),
        repeat=plan.repeat,
        seconds=round(proven.seconds, 3),
    )
