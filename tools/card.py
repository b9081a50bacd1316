"""`remend tasks card`: what a set of tasks holds, as Markdown with plots."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from sandbox.generate import MIN_LINES, fingerprints_of, modules
from sandbox.mined import Mined
from sandbox.mutate import functions
from sandbox.packages import Package
from sandbox.shipped import ungroup
from sandbox.task_index import NAMED, Line, read_index, releases_of, source_of
from tools.fetching import fetch_all

SIZES = (1, 2, 5, 10, 20, 50)  # changed lines of a fix
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
SHOWN = 10


def add_card(verbs: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser = verbs.add_parser("card", help="the dataset card: counts, sizes, licences, leakage")
    parser.add_argument("--index", default="all", help=f"{', '.join(NAMED)}, or a .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--teach", type=Path, metavar="RUN", help="folder of a run with a teacher")
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    lines = read_index(options.index)
    if not lines:
        raise InputError(f"no tasks in {options.index}")
    solved = _taught(options.teach, lines) if options.teach else {}
    fetch_all(releases_of(lines))
    facts = describe(lines, solved)
    _write(options.out, options.index, facts)
    if options.json:
        print(json.dumps({"card": str(options.out), **facts}))
    else:
        leaks = facts["leakage"]
        print(f"{options.out}: {facts['tasks']} tasks; leaks: {json.dumps(leaks['counts'])}")
    return 0


def describe(lines: Sequence[Line], solved: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Everything that the card says. `solved`: task -> (teacher's successes, tries).

    The releases must be in the cache.
    """
    homes = _homes(lines)
    packages = []
    for name in sorted({line.package for line in lines}):
        own = [line for line in lines if line.package == name]
        packages.append(
            {
                "package": name,
                "split": "+".join(sorted({line.split for line in own})),
                "licence": ", ".join(sorted({home.licence for home in homes[name]})),
                "releases": len({line.version for line in own}),
                **{s: sum(source_of(x) == s for x in own) for s in ("procedural", "release")},
            }
        )
    return {
        "tasks": len(lines),
        "source": _counts(map(source_of, lines)),
        "split": _counts(line.split for line in lines),
        "operator": _counts(line.operator for line in lines),
        "licence": _counts(_licence(line, homes) for line in lines),
        "fix_lines": _buckets([_fix_lines(line) for line in lines], SIZES, "d"),
        "test_seconds": _buckets([line.seconds for line in lines], SECONDS, "g"),
        "tests": _buckets([len(ungroup(line.f2p)) for line in lines], (1, 2, 4, 8, 16), "d"),
        "difficulty": _difficulty(lines, solved),
        "packages": packages,
        "leakage": leakage(lines, homes),
    }


def leakage(lines: Sequence[Line], homes: Mapping[str, Sequence[Package]]) -> dict[str, Any]:
    """What the splits share: packages, tasks, and the code of source files and functions.

    Functions shorter than `MIN_LINES` lines are not compared: getters are alike everywhere. Of the
    functions that are, those are counted too which a task is about, since only these can be learnt
    from one split and asked in the other.
    """
    files: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    bodies: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    where: dict[tuple[str, str, str, str], str] = {}
    for package in {home for found in homes.values() for home in found}:
        for path, source in modules(package):
            if len(source.split("\n")) > MIN_LINES:
                digest = hashlib.sha256(source.encode()).hexdigest()
                files[digest][package.split].add(f"{package.name}/{path}")
            prints = fingerprints_of(source)
            for span in functions(source):
                if span.name in prints and span.end_line - span.line + 1 >= MIN_LINES:
                    place = (package.name, package.version, path, span.name)
                    where[place] = prints[span.name]
                    bodies[prints[span.name]][package.split].add(
                        f"{package.name}/{path}:{span.name}"
                    )
    splits: dict[str, dict[str, set[str]]] = {"package": {}, "task": {}, "asked": {}}
    for line in lines:
        splits["package"].setdefault(line.package, set()).add(line.split)
        splits["task"].setdefault(line.sha256, set()).add(line.split)
        own = where.get((line.package, line.version, line.module, line.function))
        if own is not None:
            splits["asked"].setdefault(own, set()).add(line.split)
    shared = {
        "packages": [name for name, found in splits["package"].items() if len(found) > 1],
        "tasks": [sha for sha, found in splits["task"].items() if len(found) > 1],
        "files": _named(files),
        "functions": _named(bodies),
        "functions that tasks of both are about": [
            _name(bodies[own]) for own, found in splits["asked"].items() if len(found) > 1
        ],
    }
    return {"counts": {name: len(found) for name, found in shared.items()}, "shared": shared}


def _named(found: Mapping[str, Mapping[str, set[str]]]) -> list[str]:
    return sorted(_name(places) for places in found.values() if len(places) > 1)


def _name(places: Mapping[str, set[str]]) -> str:
    return " = ".join(f"{split}: {min(names)}" for split, names in sorted(places.items()))


def _homes(lines: Iterable[Line]) -> dict[str, list[Package]]:
    """The releases that each package's tasks are made from."""
    found: dict[str, dict[Package, None]] = defaultdict(dict)
    for line in lines:
        home = line.releases[0] if isinstance(line, Mined) else line.release
        if not isinstance(home, Package):
            raise InputError(f"task {line.name}: {line.package} {line.version} is not known")
        found[line.package][home] = None
    return {name: list(homes) for name, homes in found.items()}


def _licence(line: Line, homes: Mapping[str, Sequence[Package]]) -> str:
    return next(home.licence for home in homes[line.package] if home.version == line.version)


def _fix_lines(line: Line) -> int:
    """Changed lines of the fix; a mutation lies in one (sandbox/mutate.py)."""
    return line.lines if isinstance(line, Mined) else 1


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _buckets(values: Sequence[float], edges: Sequence[float], form: str) -> dict[str, int]:
    """How many values lie in each stretch up to an edge, the edge counted in."""
    counts: dict[str, int] = {}
    low: float = 0
    for edge in edges:
        counts[f"≤ {edge:{form}}"] = sum(low < value <= edge for value in values)
        low = edge
    counts[f"> {edges[-1]:{form}}"] = sum(value > low for value in values)
    counts[f"≤ {edges[0]:{form}}"] += sum(value <= 0 for value in values)
    return counts


def _taught(run: Path, lines: Sequence[Line]) -> dict[str, tuple[int, int]]:
    names = {line.name for line in lines}
    solved: dict[str, tuple[int, int]] = {}
    from rl.run_folder import read_run  # with numpy, which `remend tasks` does without

    for episode in read_run(run).episodes:
        if episode.policy == "teacher" and episode.task in names:
            won, tries = solved.get(episode.task, (0, 0))
            solved[episode.task] = (won + episode.success, tries + 1)
    if not solved:
        raise InputError(f"{run}: no episode of the teacher on a task of this index")
    return solved


def _difficulty(
    lines: Sequence[Line], solved: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, int]]:
    """Tasks by the teacher's success, for each operator: never, sometimes or always solved."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        if line.name in solved:
            won, tries = solved[line.name]
            told = "never" if won == 0 else "always" if won == tries else "sometimes"
            found[line.operator][told] += 1
    return {operator: dict(counts) for operator, counts in sorted(found.items())}


# -- writing


def _write(out: Path, index: str, facts: Mapping[str, Any]) -> None:
    """The card, and its plots in the folder `<card's name>-plots` beside it."""
    folder = out.parent / f"{out.stem}-plots"
    text = [
        f"# Dataset card: `{index}`",
        "",
        f"{facts['tasks']} repair tasks. Written by `remend tasks card --index {index}`: every "
        "number is computed from the tasks. Each task was seen to fail before its fix and to pass "
        "after it; `remend tasks verify` does so again. No third-party code is in the index.",
        "",
    ]
    titles = {
        "source": "Source",
        "split": "Split (whole packages)",
        "licence": "Licence, as the release's metadata names it",
        "fix_lines": "Lines that the fix changes",
        "test_seconds": "Seconds of one run of a task's tests, pytest's start left out",
        "tests": "Tests that fail before the fix",
        "operator": "How the bug was made",
    }
    from tools.card_plot import bars  # with numpy

    for key, title in titles.items():
        write_atomic(folder / f"{key}.svg", bars(title, facts[key]))
        text += [f"## {title}", "", f"![{title}]({folder.name}/{key}.svg)", ""]
        text += [*_rows(("", "tasks"), facts[key].items()), ""]
    text += ["## Difficulty", ""]
    if facts["difficulty"]:
        names = ("never", "sometimes", "always")
        rows = [(o, *(c.get(n, 0) for n in names)) for o, c in facts["difficulty"].items()]
        text += ["Tasks that the teacher solved, by how the bug was made.", ""]
        text += [*_rows(("", *names), rows), ""]
    else:
        text += ["Not measured: give `--teach RUN`, a run with the teacher's episodes.", ""]
    text += [
        "## Packages",
        "",
        *_packages(facts["packages"]),
        "",
        "## Leakage between splits",
        "",
        "Found in both splits:",
        "",
    ]
    for name, found in facts["leakage"]["shared"].items():
        text.append(f"- {name}: {len(found)}")
        text += [f"  - `{item}`" for item in found[:SHOWN]]
        text += [f"  - and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    write_atomic(out, "\n".join(text) + "\n")


def _packages(packages: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = ("package", "split", "licence", "releases", "procedural", "release")
    return _rows(keys, ([row[key] for key in keys] for row in packages))


def _rows(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(map(_cell, cells))} |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
