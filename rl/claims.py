"""The paper's six claims, each held against a study's numbers by a rule written down beforehand.

A claim is a statistic with a 95 % interval and a line to hold it against. It holds, or does not,
only where the whole interval lies on one side of that line; else it is undecided. Nothing here
looks at which way would be nicer. Of a few tasks no interval is believed.

The paper: Zhu et al. 2025, "Agentic Reinforcement Learning for Real-World Code Repair", arXiv
2510.22075v1. Its figures 2 and 3 label bars without giving their errors as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["holds", "does not hold", "undecided"]
Interval = Mapping[str, float]

MARGIN = 0.05  # of success: "on par" means within it
LEAST_GAIN = 0.07  # the smallest gain that the paper reports
LEAST_TASKS = 20  # an interval over fewer is too narrow as often as not
SAME_USE = 0.1  # calls an episode: tool use that differs by less is the same


@dataclass(frozen=True)
class Claim:
    """key: in study.json. claim: the paper's. paper, source: its figure and where that stands.
    statistic: what is measured here. rule: when it holds."""

    key: str
    claim: str
    paper: str
    source: str
    statistic: str
    rule: str


CLAIMS = {
    claim.key: claim
    for claim in (
        Claim(
            "student",
            "The distilled student is on par with its teacher",
            "SFT 12.3 %, GPT-4.1 15.1 %; the difference not significant",
            "§6 and figure 2, full pipeline, test; abstract",
            "success of SFT less that of its teacher, in the environment trained in",
            f"holds if the whole interval is above −{100 * MARGIN:.0f} points, does not hold if "
            "it is all below",
        ),
        Claim(
            "gain",
            "RL adds 7 to 20 points in the environment trained in",
            "+7 (test, 17 → 24 %) and +20 points (validation, 7 → 27 %) over the untuned model; "
            "over SFT +16.6 and +22.8",
            "§6 and figure 3, simplified pipeline; abstract",
            "success of SFT+RL less that of SFT, in the environment trained in",
            f"holds if the whole interval is at or above +{100 * LEAST_GAIN:.0f} points, does not "
            "hold if it is all below",
        ),
        Claim(
            "transfer",
            "Gains do not carry over to the other environment",
            "RL trained in the simplified pipeline: 4.1 % in the full one, where SFT has 12.3 % "
            "and the untuned model 2.9 %",
            "§6 and figure 2; §7; abstract",
            "gain of RL over SFT in the environment not trained in",
            "decided only if the gain where trained is all above 0; then does not hold if the gain "
            "elsewhere is all above 0, too; holds if it is not and is less by an interval all "
            "above 0",
        ),
        Claim(
            "thinking",
            "Thinking mode is on par or worse",
            "off → on: SFT 12.3 → 3.7 % (full, test); RL 27.2 → 14.4 and 24.5 → 11.8 % "
            "(simplified, validation and test); untuned 2.9 → 4.8 % (full)",
            "§6, figures 2 and 3; abstract",
            "success with thinking less that without, SFT and SFT+RL, where trained",
            f"holds if the whole interval is below +{100 * MARGIN:.0f} points, does not hold if it "
            "is all above",
        ),
        Claim(
            "exploitation",
            "Long RL runs exploit the reward",
            "65 % reported success after 3,000 steps, with validation code deleted; seen in "
            "trajectories, no rate given",
            "§6.1",
            "share of episodes that earn the reward and fail the tests held back, guard off: last "
            "quarter of the steps less first quarter",
            "holds if the whole interval is above 0, does not hold if none of it is",
        ),
        Claim(
            "tools",
            "Tool use shifts with RL",
            "from use spread over ten tools to about 71 % validate_and_build and 14 % "
            "dependency_upgrade",
            "§6.1 and figure 4",
            "calls an episode of each tool, SFT+RL less SFT, where trained; intervals at "
            "95 % together (Bonferroni)",
            f"holds if some tool's interval excludes 0, does not hold if all lie within "
            f"±{SAME_USE} calls",
        ),
    )
}


def above(found: Interval, line: float) -> Outcome:
    """Whether an interval is all at or above a line ("holds"), all below, or neither."""
    if found["low"] >= line:
        return "holds"
    return "does not hold" if found["high"] < line else "undecided"


def below(found: Interval, line: float) -> Outcome:
    """Whether an interval is all below a line ("holds"), all at or above, or neither."""
    if found["high"] < line:
        return "holds"
    return "does not hold" if found["low"] >= line else "undecided"


def student(gap: Interval) -> Outcome:
    return above(gap, -MARGIN)


def gain(matched: Interval) -> Outcome:
    return above(matched, LEAST_GAIN)


def transfer(matched: Interval, elsewhere: Interval, lost: Interval) -> Outcome:
    """`lost`: the gain where trained less that elsewhere, paired."""
    if matched["low"] <= 0:
        return "undecided"  # there is nothing that could carry over
    if elsewhere["low"] > 0:
        return "does not hold"
    return "holds" if lost["low"] > 0 else "undecided"


def thinking(change: Interval) -> Outcome:
    return below(change, MARGIN)


def exploitation(rise: Interval) -> Outcome:
    if rise["low"] > 0:
        return "holds"
    return "does not hold" if rise["high"] <= 0 else "undecided"


def tools(changes: Mapping[str, Interval]) -> Outcome:
    """`changes`: by tool, intervals that hold together."""
    if any(change["low"] > 0 or change["high"] < 0 for change in changes.values()):
        return "holds"
    same = all(-SAME_USE < c["low"] and c["high"] < SAME_USE for c in changes.values())
    return "does not hold" if same else "undecided"


def row(
    key: str, ours: Interval | None, outcome: Outcome, note: str = "", parts: Any = None
) -> dict[str, Any]:
    """A claim's row of study.json; without `ours` it was not measured, and is undecided, as it is
    where fewer than LEAST_TASKS tasks measured it."""
    claim = CLAIMS[key]
    if ours is not None and ours["n"] < LEAST_TASKS:
        outcome, note = "undecided", f"measured on {ours['n']:.0f} tasks: too few to decide"
    return {
        **{name: getattr(claim, name) for name in claim.__dataclass_fields__},
        "ours": dict(ours) if ours is not None else None,
        "outcome": outcome if ours is not None else "undecided",
        "note": note if ours is not None else note or "not measured in this study",
        "parts": parts or {},
    }
