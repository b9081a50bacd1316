"""A row's task directory for a container image: what Harbor needs to run it where the image is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path, PurePosixPath
from string import Template

from configs.errors import InputError
from sandbox.importers.rows import Issue
from sandbox.packages import INDEX
from sandbox.task_file import task_toml

_TEMPLATES = INDEX / "harbor-image"
FOLDER = "/testbed"  # where the images of SWE-bench, SWE-smith and R2E-Gym have the repository
# the two projects of SWE-bench whose tests are not pytest's
_DJANGO = "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1"
_SYMPY = "PYTHONWARNINGS=ignore bin/test -C --verbose"

# in a new repository: the history and `git diff` of the old one would tell the answer
_PUT_BUG = """\
COPY bug.patch /tmp/
RUN git apply /tmp/bug.patch && rm -rf /tmp/bug.patch .git && git init -q && git add -A && \\
    git -c user.name=remend -c user.email=remend@localhost commit -qm start
"""


def write_for_image(issue: Issue, folder: Path, split: str) -> None:
    """Write the task directory; `sandbox.image_task` reads it.

    Raises InputError when the row names no image.
    """
    if not issue.image:
        raise InputError("it names no container image, and no --repo-dir holds its repository")
    if not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", issue.image, re.ASCII):
        raise InputError(f"{issue.image!r} is no container image's name")
    tests = {"fail_to_pass": issue.fail_to_pass, "pass_to_pass": issue.pass_to_pass}
    restored = _named(issue) if issue.bug else ()  # others' are brought by the row
    known = {"folder": FOLDER, "image": issue.image, "command": test_command(issue)}
    known["restored"] = " ".join(map(shlex.quote, restored))
    texts = {
        "task.toml": task_toml(issue.name, issue.package, _facts(issue, split), large=True),
        "instruction.md": issue.problem.strip() + "\n",
        "environment/Dockerfile": _filled("Dockerfile", known),
        "tests/test.sh": _filled("test.sh", known),
        "tests/grade.py": _text("grade.py"),
        "tests/test.patch": issue.tests_patch,
        "tests/tests.json": json.dumps(tests, ensure_ascii=False, indent=1) + "\n",
        "solution/solve.sh": _filled("solve.sh", known),
        "solution/gold.patch": issue.fix,
    }
    texts |= {f"tests/files/{path}": data.decode() for path, data in issue.test_files.items()}
    if issue.bug:  # its fix is to take it back
        texts["environment/Dockerfile"] += _PUT_BUG
        texts["environment/bug.patch"] = texts["solution/gold.patch"] = issue.bug
        texts["solution/solve.sh"] = texts["solution/solve.sh"].replace("apply", "apply -R")
    elif issue.test_files:  # the image has the tests too, where the agent could read them
        hidden = {PurePosixPath(path).parts[0] for path in issue.test_files}
        places = " ".join(f"/{name} /root/{name} {FOLDER}/{name}" for name in sorted(hidden))
        texts["environment/Dockerfile"] += f"RUN rm -rf {places}\n"
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    for path in ("tests/test.sh", "solution/solve.sh"):
        (folder / path).chmod(0o755)


def test_command(issue: Issue) -> str:
    """The shell command that prints what became of each test."""
    brought = [*issue.brought]
    if issue.repo == "django/django":
        modules = [p.removeprefix("tests/").removesuffix(".py") for p in brought if p[-3:] == ".py"]
        return " ".join((_DJANGO, *(shlex.quote(m.replace("/", ".")) for m in modules)))
    if issue.repo == "sympy/sympy" and issue.format == "swe-bench":
        return " ".join((_SYMPY, *map(shlex.quote, brought)))
    files = _named(issue) or [path for path in brought if path.endswith(".py")]
    return " ".join(("python -m pytest -rA -p no:cacheprovider", *map(shlex.quote, files)))


def _named(issue: Issue) -> list[str]:
    """The files in the names of the row's tests."""
    ids = (*issue.fail_to_pass, *issue.pass_to_pass)
    return list(dict.fromkeys(id.partition("::")[0] for id in ids if "::" in id))


def _facts(issue: Issue, split: str) -> dict[str, str | tuple[str, ...]]:
    module = next((path for path in issue.changed if path.endswith(".py")), "unknown")
    return {
        "name": issue.name,
        "source": "imported",
        "split": split,
        "package": issue.package,
        "version": issue.commit[:12] or "unknown",
        "licence": issue.licence or "unknown",
        "module": module,
        "function": "unknown",
        "operator": "fix",
        "fail_to_pass": issue.fail_to_pass,
        "pass_to_pass": issue.pass_to_pass,
        "python_path": (),
        "protected": (),
        "origin": "image",
        "image": issue.image,
        "provenance": issue.provenance,
    }


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _filled(name: str, values: dict[str, str]) -> str:
    return Template(_text(name)).substitute(values)
