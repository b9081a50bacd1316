"""From the lines that a test run wrote, which untrusted code may have forged, to a `TestReport`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.base import Frame, TestCase, TestReport

MAX_TEXT = 2000
_OUTCOMES = ("passed", "failed", "error", "skipped")


def read_report(answer: Mapping[str, Any], ids: Sequence[str]) -> TestReport:
    """The report on `ids` from a runner's answer; lines that are not as they should be are skipped.

    Tests of a file that could not be collected count as `error`, with the file's error.
    """
    cases: dict[str, TestCase] = {}
    broken: dict[str, TestCase] = {}
    wanted = frozenset(ids)
    for line in answer["lines"]:
        try:
            record = json.loads(line)
            if "test" in record and record["test"] in wanted:
                cases[record["test"]] = _case(record, record["test"], record["outcome"])
            elif "collector" in record:
                broken[record["collector"]] = _case(record, record["collector"], "error")
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    killed_by = answer["killed_by"]
    found = tuple(cases.get(test) or _missing(test, broken) for test in ids)
    if killed_by is None and any(case.error.startswith("MemoryError") for case in found):
        killed_by = "memory"
    return TestReport(
        cases=found,
        exit_code=answer["exit_code"],
        timed_out=killed_by == "deadline",
        killed_by=killed_by,
        seconds=answer["seconds"],
        tail=answer["tail"][-MAX_TEXT:],
        cpu_s=answer.get("cpu_s", 0.0),
    )


def _case(record: Mapping[str, Any], name: str, outcome: Any) -> TestCase:
    if outcome not in _OUTCOMES:
        raise ValueError("no outcome")
    error = record.get("error", "")
    frames = tuple(_frame(*frame) for frame in record.get("frames", ()))
    return TestCase(name, outcome, _text(error), frames)


def _frame(path: object, line: object, function: object, source: object) -> Frame:
    if not isinstance(line, int):
        raise TypeError("no line number")
    return Frame(_text(path), line, _text(function), _text(source))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value[:MAX_TEXT]


def _missing(test: str, broken: Mapping[str, TestCase]) -> TestCase:
    """The case of a test that no line told of: its file, class or folder may have failed."""
    for name, case in broken.items():
        if test.startswith((f"{name}::", f"{name}/")):
            return TestCase(test, "error", case.error, case.frames)
    return TestCase(test, "missing")
