"""How far the verdicts of the two environments on the same diffs agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sandbox.environments import ENVIRONMENTS, Environment

_CELLS = {
    (True, True): "both_pass",
    (True, False): "simplified_only",
    (False, True): "full_only",
    (False, False): "both_fail",
}
# environment -> a verdict as recorded
Verdicts = Mapping[Environment, Mapping[str, Any]]


def agreement(episodes: Iterable[Verdicts]) -> dict[str, Any]:
    """`{"n", "both_pass", "simplified_only", "full_only", "both_fail", "agree", "kappa"}`.

    A diff counts where both environments judged it and neither had trouble of its own; a
    quarantined one has not passed. `agree` is the share of equal verdicts, `kappa` Cohen's
    (1960): agreement beyond chance, None where one side always says the same.
    """
    counts = dict.fromkeys(_CELLS.values(), 0)
    for verdicts in episodes:
        told = [verdicts.get(name, {}).get("verdict") for name in ENVIRONMENTS]
        if None in told or "error" in told:
            continue
        simplified, full = (word == "pass" for word in told)
        counts[_CELLS[simplified, full]] += 1
    n = sum(counts.values())
    if not n:
        return {"n": 0, **counts, "agree": None, "kappa": None}
    agree = (counts["both_pass"] + counts["both_fail"]) / n
    passed = [(counts["both_pass"] + counts[key]) / n for key in ("simplified_only", "full_only")]
    chance = passed[0] * passed[1] + (1 - passed[0]) * (1 - passed[1])
    constant = any(share in (0.0, 1.0) for share in passed)
    kappa = None if constant else (agree - chance) / (1 - chance)
    return {"n": n, **counts, "agree": agree, "kappa": kappa}


def table(found: Mapping[str, Any]) -> str:
    """The counts as four cells, for people."""
    lines = [
        f"{'':<18} {'full pass':>10} {'full fail':>10}",
        f"{'simplified pass':<18} {found['both_pass']:>10} {found['simplified_only']:>10}",
        f"{'simplified fail':<18} {found['full_only']:>10} {found['both_fail']:>10}",
    ]
    if found["n"]:
        kappa = "–" if found["kappa"] is None else f"{found['kappa']:.2f}"
        lines.append(f"{found['n']} diffs, {100 * found['agree']:.1f} % agree, kappa {kappa}")
    return "\n".join(lines)
