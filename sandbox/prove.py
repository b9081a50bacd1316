"""Tests that can be relied upon: each one alone, then all of them again and again, shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sandbox.base import Sandbox, TestReport, Tree

DEADLINE_S = 20.0


@dataclass
class Proof:
    """The tests that held, the reason for each that did not, and the longest run in seconds."""

    fail_to_pass: list[str]
    pass_to_pass: list[str]
    dropped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    runs: int = 0


async def prove(
    sandbox: Sandbox,
    buggy: Tree,
    fixed: Tree,
    fail_to_pass: Sequence[str],
    pass_to_pass: Sequence[str],
    repeat: int,
    seed: int = 0,
) -> Proof:
    """Run the tests on both trees and drop those that do not do what they should, every time.

    Each fail-to-pass test must fail on `buggy` and pass on `fixed` alone, in a process of its own:
    state that leaks from other tests makes false ones. Then all must do so together on each tree,
    `repeat` times in file order and as often in random orders.
    """
    proof = Proof(list(fail_to_pass), list(pass_to_pass))
    for tree, well in ((buggy, False), (fixed, True)):
        await sandbox.reset(tree)
        for test in list(proof.fail_to_pass):
            report = await sandbox.run_tests([test], timeout_s=DEADLINE_S)
            proof.runs += 1
            _drop(proof, report, [] if well else [test], [test] if well else [], "alone")
    for round in range(2 * repeat):
        for tree, well in ((buggy, False), (fixed, True)):
            tests = proof.fail_to_pass + proof.pass_to_pass
            if not proof.fail_to_pass:
                return proof
            await sandbox.reset(tree)
            report = await sandbox.run_tests(
                tests, timeout_s=DEADLINE_S, shuffle=seed + round if round % 2 else None
            )
            proof.runs += 1
            proof.seconds = max(proof.seconds, report.seconds)
            order = f"in random order {seed + round}" if round % 2 else "in file order"
            ill = [] if well else proof.fail_to_pass
            good = tests if well else proof.pass_to_pass
            _drop(proof, report, ill, good, order)
    return proof


def _drop(
    proof: Proof, report: TestReport, to_fail: Sequence[str], to_pass: Sequence[str], how: str
) -> None:
    """Take out the tests that did not end as they should, with the reason."""
    outcomes = {case.id: case.outcome for case in report.cases}
    reasons: dict[str, str] = {}
    for test in to_fail:
        if outcomes[test] not in ("failed", "error"):
            reasons[test] = f"{outcomes[test]} with the bug, {how}"
    for test in to_pass:
        if outcomes[test] != "passed":
            why = f" ({report.killed_by})" if report.killed_by else ""
            reasons[test] = f"{outcomes[test]}{why}, though it should pass, {how}"
    proof.dropped |= reasons
    proof.fail_to_pass = [test for test in proof.fail_to_pass if test not in reasons]
    proof.pass_to_pass = [test for test in proof.pass_to_pass if test not in reasons]
