"""What policies did in their episodes: calls in sequence, kinds of edits, ways to fail."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rl.episodes import Episode
from rl.resample import crossed
from sandbox.agent_tools import EDITED

START, END = "start", "end"

_TOKEN = re.compile(r"[^\W\d]\w*|\d[\w.]*|\"[^\"\n]*\"|'[^'\n]*'|[<>=!]=|//|\*\*|[^\w\s]")
_COMPARE = {"<", ">", "<=", ">=", "==", "!=", "is", "in"}
_LOGIC = {"and", "or", "not"}
_ARITHMETIC = {"+", "-", "*", "/", "//", "%", "**"}
_CONSTANT = {"True", "False", "None"}

# ways to fail, in the order in which they are asked about
FAILURES = {
    "exploit": "passed, but flagged as exploiting the reward",
    "sandbox": "the sandbox broke",
    "tampered": "changed files that a repair may not touch",
    "no call": "no call could be read",
    "no edit": "nothing was edited",
    "edit missed": "no edit applied: what it quotes is not there, or there more than once",
    "broken code": "what was left does not run: no test did",
    "regression": "the failing tests pass, others no longer do",
    "wrong repair": "edited, and the failing tests still fail",
    "undone": "the tests had passed, what was handed in does not",
}


def transitions(episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """The share of each next call after a call (first-order, with start and end), by tool.

    A row sums to 1; the paper's figure 4 shows the same.
    """
    counts: dict[str, Counter[str]] = {}
    for episode in episodes:
        last = START
        for name in [*calls_of(episode), END]:
            counts.setdefault(last, Counter())[name] += 1
            last = name
    return {
        before: {after: n / sum(row.values()) for after, n in sorted(row.items())}
        for before, row in sorted(counts.items())
    }


def calls_of(episode: Episode) -> list[str]:
    """The names of an episode's calls, in order."""
    return [str(call["name"]) for turn in episode.record["turns"] for call in turn["calls"]]


def edits_of(episode: Episode) -> list[tuple[str, str, bool]]:
    """(old, new, applied) of each edit, in order."""
    found = []
    for turn in episode.record["turns"]:
        whole = len(turn["calls"]) == len(turn["observations"])
        # with a call that could not be read, an observation is no longer at its call's place
        missed = EDITED if EDITED in turn["observations"] else ""
        for number, call in enumerate(turn["calls"]):
            if call["name"] == "edit":
                said = turn["observations"][number] if whole else missed
                arguments = call["arguments"]
                old, new = (str(arguments.get(key, "")) for key in ("old", "new"))
                found.append((old, new, said == EDITED))
    return found


def edit_kind(old: str, new: str) -> str:
    """What kind of change an edit makes, by the tokens in which its two texts differ."""
    before, after = _TOKEN.findall(old), _TOKEN.findall(new)
    removed: list[str] = []
    added: list[str] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag != "equal":
            removed += before[a:b]
            added += after[c:d]
    if {"raise", "assert"} & set(removed) and not {"raise", "assert"} & set(added):
        return "check deleted"
    if {"except", "suppress"} & set(added) and "except" not in removed:
        return "exception swallowed"
    changed = {*removed, *added}
    if not changed:
        return "layout"
    if changed <= _COMPARE | {"not"} and changed & _COMPARE:
        return "comparison"
    if changed <= _LOGIC:
        return "boolean"
    if changed <= _ARITHMETIC:
        return "arithmetic"
    if all(t in _CONSTANT or t[0].isdigit() or t[0] in "\"'" for t in changed):
        return "constant"
    if all(t.isidentifier() for t in changed) and removed and added:
        return "name"
    if not added:
        return "code removed"
    if not removed:
        return "code added"
    return "other"


def failure(episode: Episode) -> str:
    """Why an episode did not succeed, a key of FAILURES; "" if it did."""
    if episode.success:
        return ""
    verdict, record = episode.verdict, episode.record
    if episode.outcome == "quarantine":
        return "exploit"
    if episode.outcome == "error" or record["stop"] == "sandbox":
        return "sandbox"
    if any(flag.startswith(("protected:", "outside:")) for flag in episode.flags):
        return "tampered"
    if not calls_of(episode):
        return "no call"
    edits = edits_of(episode)
    if not edits:
        return "no edit"
    if not any(applied for _, _, applied in edits):
        return "edit missed"
    to_fix, to_keep = (
        set((verdict.get(key) or {}).values()) for key in ("fail_to_pass", "pass_to_pass")
    )
    if (to_fix | to_keep) <= {"missing"}:
        return "broken code"
    if to_fix == {"passed"}:
        return "regression"
    said = [text for turn in record["turns"] for text in turn["observations"]]
    return "undone" if any(_all_pass(text) for text in said) else "wrong repair"


def _all_pass(text: str) -> bool:
    return text.startswith("all ") and text.endswith(" tests pass")


def shares(kinds: Sequence[str]) -> dict[str, float]:
    """Each kind's share, most frequent first; what is "" is not counted."""
    counts = Counter(kind for kind in kinds if kind)
    return {kind: n / sum(counts.values()) for kind, n in counts.most_common()}


def per_task(
    episodes: Sequence[Episode],
    count: Callable[[Episode], Mapping[str, float]],
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """name -> task -> mean of `count` over the task's episodes."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for episode in episodes:
        groups.setdefault(episode.task, []).append(count(episode))
    return {
        name: {
            task: float(np.mean([found.get(name, 0.0) for found in each]))
            for task, each in sorted(groups.items())
        }
        for name in names
    }


Pairs = Sequence[tuple[Sequence[Episode], Sequence[Episode]]]  # before and after, for each seed


def changes(pairs: Pairs, count: Callable[[Episode], Mapping[str, float]]) -> dict[str, Any]:
    """By name, before, after and the paired change of `count` an episode, over seeds and tasks.

    The intervals hold together: each is of level 1 - 0.05 / m for m names (Bonferroni). Pairs are
    of the same tasks, as `crossed` wants them. Largest change first.
    """
    everyone = [e for pair in pairs for side in pair for e in side]
    names = sorted({name for episode in everyone for name in count(episode)})
    level = 1 - 0.05 / max(1, len(names))
    tables = [tuple(per_task(side, count, names) for side in pair) for pair in pairs]
    found = {}
    for name in names:
        before, after = (
            np.array([list(table[side][name].values()) for table in tables]) for side in (0, 1)
        )
        found[name] = {
            "before": float(before.mean()),
            "after": float(after.mean()),
            **crossed(after - before, level),
        }
    return dict(sorted(found.items(), key=lambda item: -abs(item[1]["mean"])))


def tool_counts(episode: Episode) -> Mapping[str, float]:
    return Counter(calls_of(episode))


def edit_counts(episode: Episode) -> Mapping[str, float]:
    """Edits of an episode by kind."""
    return Counter(edit_kind(old, new) for old, new, _ in edits_of(episode))
