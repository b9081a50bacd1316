"""SWE-smith's rows: `patch` puts a bug into the repository as it is; the fix is its reverse.

The repository's name ends in the commit that it mirrors, as in
`swesmith/oauthlib__oauthlib.1fd52536`. https://huggingface.co/datasets/SWE-bench/SWE-smith
"""

from __future__ import annotations

import re
from typing import Any

from configs.errors import InputError
from sandbox.importers.rows import Issue, diff, names, slug, some_names, text

FORMAT = "swe-smith"
SPLIT = "train"


def recognizes(record: dict[str, Any]) -> bool:
    known = {"instance_id", "patch", "FAIL_TO_PASS", "image_name", "repo"}
    return known <= set(record) and "test_patch" not in record


def read(record: dict[str, Any]) -> Issue:
    """Raises InputError, naming the field, for a row that lacks one or has a wrong one."""
    repo = text(record, "repo")
    mirrored = re.fullmatch(r"(?:[^/]+/)?(?P<project>[^/]+)\.(?P<commit>[0-9a-f]{7,40})", repo)
    if mirrored is None:
        raise InputError(f"repo does not end in a commit, as in owner__name.1fd52536: {repo!r}")
    return Issue(
        format=FORMAT,
        name=slug(text(record, "instance_id")),
        repo=mirrored["project"].replace("__", "/"),
        commit=mirrored["commit"],
        # some of its rows have no statement of the problem
        problem=text(record, "problem_statement", default="Tests fail because of a bug."),
        bug=diff(record, "patch"),
        fail_to_pass=some_names(record, "FAIL_TO_PASS"),
        pass_to_pass=names(record, "PASS_TO_PASS"),
        image=text(record, "image_name"),
        licence=text(record, "license", default=""),
        facts=(("mirror", repo),),
    )
