"""Tests that the agent neither runs nor reads, and that its verdict wants all the same.

A repair that fits the tests that were shown and no others earns nothing: what cannot be seen cannot
be learnt by heart.
"""

from __future__ import annotations

import hashlib

from sandbox.task import Task


def shown_tests(task: Task, held_back: float) -> tuple[str, ...]:
    """The ids of the tests that the agent may run, in their order.

    Held back is a share of those that the instruction does not name, drawn by a hash of task and
    id: the same in every episode, on every machine. One that fails is always shown.
    """
    tests = (*task.fail_to_pass, *task.pass_to_pass)
    named = [test for test in tests if test in task.instruction]
    free = [test for test in tests if test not in set(named or task.fail_to_pass[:1])]

    def draw(test: str) -> bytes:
        return hashlib.sha256(f"{task.name}\0{test}".encode("utf-8", "surrogatepass")).digest()

    hidden = set(sorted(free, key=draw)[: round(held_back * len(free))])
    return tuple(test for test in tests if test not in hidden)
