"""SWE-bench's rows (and those of SWE-Gym, SWE-rebench and others of that shape).

`patch` fixes the bug at `base_commit`, `test_patch` brings the tests; FAIL_TO_PASS and PASS_TO_PASS
are lists, or the text of lists. https://www.swebench.com/SWE-bench/guides/datasets/
"""

from __future__ import annotations

from typing import Any

from sandbox.importers.rows import Issue, commit, diff, names, slug, some_names, text

FORMAT = "swe-bench"
SPLIT = "heldout"


def recognizes(record: dict[str, Any]) -> bool:
    return {"instance_id", "base_commit", "patch", "test_patch", "FAIL_TO_PASS"} <= set(record)


def read(record: dict[str, Any]) -> Issue:
    """Raises InputError, naming the field, for a row that lacks one or has a wrong one."""
    name = text(record, "instance_id")
    image = text(record, "image_name", "docker_image", default="")
    wanted = ("version", "environment_setup_commit", "created_at")
    return Issue(
        format=FORMAT,
        name=slug(name),
        repo=text(record, "repo"),
        commit=commit(record, "base_commit"),
        problem=text(record, "problem_statement"),
        fix=diff(record, "patch"),
        tests_patch=diff(record, "test_patch", empty=True),
        fail_to_pass=some_names(record, "FAIL_TO_PASS"),
        pass_to_pass=names(record, "PASS_TO_PASS"),
        # the name under which its authors publish the image of each instance
        image=image or f"swebench/sweb.eval.x86_64.{name.replace('__', '_1776_').lower()}:latest",
        licence=text(record, "license", "license_name", default=""),
        facts=tuple((key, str(record[key])) for key in wanted if record.get(key)),
    )
