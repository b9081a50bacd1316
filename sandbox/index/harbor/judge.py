"""Do the tests pass with the source in one folder? Exit code 0 if so, 1 otherwise.

    python -I judge.py APP TESTS

Only source changes count: the archive in TESTS is unpacked afresh, the files of APP that differ and
that a fix may touch are put over it, and the pristine tests run on that.
"""

import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree
from pathlib import Path


def files(root: Path) -> dict[str, bytes]:
    """Plain text files below a folder, by relative path; links are not followed."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def prepare(app: Path, tests: Path, facts: dict, tree: Path) -> None:
    """Make `tree` the pristine release with the allowed changes of `app`."""
    archive = tests / facts["archive"]
    if hashlib.sha256(archive.read_bytes()).hexdigest() != facts["sha256"]:
        sys.exit("the archive is not the pinned one")
    with tempfile.TemporaryDirectory() as aside, tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(aside)
        (top,) = Path(aside).iterdir()
        top.rename(tree)
    pristine, now = files(tree), files(app)
    for path in sorted({*pristine, *now}):
        protected = any(fnmatch.fnmatchcase(path, pattern) for pattern in facts["protected"])
        if protected or now.get(path) == pristine.get(path):
            continue
        if path not in pristine and not inside_package(path, pristine, facts["python_path"]):
            continue
        target = tree / path
        if path in now:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(now[path])
        else:
            target.unlink()


def inside_package(path: str, pristine: dict[str, bytes], python_path: list[str]) -> bool:
    """Whether a new file lies beside older ones of a package, where it hides no other module."""
    folder = os.path.dirname(path)
    roots = {"" if entry == "." else entry for entry in python_path}
    return folder not in {"", *roots} and any(os.path.dirname(old) == folder for old in pristine)


def passed(tree: Path, facts: dict) -> bool:
    """Whether every test asked for was run and passed."""
    report = tree.parent / "report.xml"
    wanted = facts["fail_to_pass"] + facts["pass_to_pass"]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", "."]
    command += ["--confcutdir", ".", "-p", "no:cacheprovider", "--junitxml", str(report), *wanted]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment["PYTHONPATH"] = os.pathsep.join(str(tree / p) for p in facts["python_path"])
    ended = subprocess.run(command, cwd=tree, env=environment, timeout=300, check=False)
    if ended.returncode != 0 or not report.exists():
        return False
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    good = [case for case in cases if not re.search("failure|error|skipped", tags(case))]
    return len(good) >= len(wanted)


def tags(case: xml.etree.ElementTree.Element) -> str:
    return " ".join(child.tag for child in case)


def main() -> int:
    app, tests = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    facts = json.loads((tests / "tests.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        prepare(app, tests, facts, tree)
        good = passed(tree, facts)
    print("pass" if good else "fail")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
