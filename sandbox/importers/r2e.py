"""R2E-Gym's rows: a commit taken apart, its tests, and what they said before and after.

`parsed_commit_content` holds both texts of every file that the commit changed,
`execution_result_content` the tests (put into `r2e_tests/`) and the output of a run on the older
commit, `expected_output_json` the outcomes on the newer one. https://github.com/R2E-Gym/R2E-Gym
"""

from __future__ import annotations

import json
import re
from typing import Any

from configs.errors import InputError
from sandbox.importers.rows import Issue, commit, slug, text
from sandbox.layout import is_test
from sandbox.patch import check_path, make_patch

FORMAT = "r2e"
SPLIT = "train"
TESTS = "r2e_tests"
_COLOUR = re.compile(r"\x1b\[\d+m")
_OUTCOME = re.compile(r"(PASSED|FAILED|ERROR) [^:\s]+::(\S.*)")


def recognizes(record: dict[str, Any]) -> bool:
    return {"docker_image", "parsed_commit_content", "expected_output_json"} <= set(record)


def read(record: dict[str, Any]) -> Issue:
    """Raises InputError, naming the field, for a row that lacks one or has a wrong one."""
    repo, newer = text(record, "repo_name", "repo"), commit(record, "commit_hash")
    parsed = _object(record, "parsed_commit_content")
    ran = _object(record, "execution_result_content")
    after = _outcomes(_object(record, "expected_output_json"))
    before = _log(str(ran.get("old_commit_res_stdout") or ""))
    good = [name for name, outcome in after.items() if outcome == "PASSED"]
    failing = tuple(name for name in good if before.get(name) != "PASSED")
    if not failing:
        raise InputError("no test of expected_output_json passes that did not pass before")
    fix = _fix(parsed)
    return Issue(
        format=FORMAT,
        name=slug(f"{repo}-{newer[:12]}"),
        repo=repo,
        # the parent: there the commit's own patch applies
        commit=commit(parsed, "old_commit_hash"),
        problem=_problem(text(record, "problem_statement", "prompt")),
        fix=fix,
        test_files=_tests(ran),
        fail_to_pass=failing,
        pass_to_pass=tuple(name for name in good if name not in failing),
        image=text(record, "docker_image"),
        facts=(("fixed_by", newer),),
    )


def _fix(parsed: dict[str, Any]) -> str:
    old: dict[str, bytes] = {}
    new: dict[str, bytes] = {}
    for change in _list(parsed, "file_diffs"):
        try:
            path = change["header"]["file"]["path"]
            texts = change["old_file_content"], change["new_file_content"]
        except (KeyError, TypeError):
            raise InputError("parsed_commit_content: a file without path or contents") from None
        if not all(isinstance(item, str) for item in (path, *texts)):
            raise InputError("parsed_commit_content: a file whose path or contents are not text")
        if not is_test(check_path(path), ()) and texts[0] != texts[1]:
            # an empty text stands for no file too
            old |= {path: texts[0].encode()} if texts[0] else {}
            new |= {path: texts[1].encode()} if texts[1] else {}
    if not old and not new:
        raise InputError("parsed_commit_content changes no file but tests")
    return make_patch(old, new)


def _tests(ran: dict[str, Any]) -> dict[str, bytes]:
    paths, codes = _list(ran, "test_file_names"), _list(ran, "test_file_codes")
    if not paths or len(paths) != len(codes):
        raise InputError("execution_result_content: test_file_names and test_file_codes differ")
    return {check_path(f"{TESTS}/{p}"): str(c).encode() for p, c in zip(paths, codes, strict=True)}


def _log(output: str) -> dict[str, str]:
    """Outcomes by name from pytest's short summary, as the dataset's authors read it."""
    lines = _COLOUR.sub("", output).rpartition("short test summary info")[2].splitlines()
    found = (_OUTCOME.match(line) for line in lines)
    return _outcomes({match[2].replace("::", "."): match[1] for match in found if match})


def _outcomes(told: dict[str, Any]) -> dict[str, str]:
    """Outcomes by `Class.test`, without colours and messages."""
    return {_COLOUR.sub("", name).partition(" - ")[0]: str(told[name]) for name in told}


def _problem(told: str) -> str:
    """The issue, out of the tags that the dataset puts around it."""
    found = re.search(r"\[ISSUE\](.*)\[/ISSUE\]", told, re.S)
    return (found[1] if found else told).strip()


def _object(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise InputError(f"{key} is missing or is not a JSON object")
    return value


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise InputError(f"{key} is missing or is not a list")
    return value
