"""Unified diffs: what is made can be applied, exactly, and nothing else can."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox.patch import PatchError, apply_patch, make_patch, parse_patch, paths_of

LINES = st.lists(
    st.tuples(st.sampled_from(["a", "b", "", " x", "-", "+", "\\", "@@ -1 +1 @@", "é", "--- a"]),
              st.sampled_from(["\n", "\n", "\n", "\r\n", "\r"])),
    max_size=30,
)  # fmt: skip
CONTENT = st.builds(
    lambda lines, end: ("".join(a + b for a, b in lines) + end).encode(),
    LINES,
    st.sampled_from(["", "end", "\f"]),
)
PATHS = st.sampled_from(["a.py", "pkg/b.py", "pkg/with space.txt", "ü.py", "c"])
STATES = st.dictionaries(PATHS, CONTENT, max_size=4)


def applied(state: dict[str, bytes], patch: str) -> dict[str, bytes]:
    after = {**state, **apply_patch(state, patch)}
    return {path: data for path, data in after.items() if data is not None}


@given(STATES, STATES)
def test_what_is_made_applies_forth_and_back(old: dict, new: dict) -> None:
    assert applied(old, make_patch(old, new)) == new
    assert applied(new, make_patch(new, old)) == old


@given(STATES, STATES)
@example({"a.py": b""}, {"a.py": b"a\n"})
def test_a_patch_fits_only_the_state_it_was_made_from(old: dict, new: dict) -> None:
    patch = make_patch(old, new)
    if old != new:
        with pytest.raises(PatchError):
            apply_patch(new, patch)
    else:
        assert patch == ""


@given(STATES, STATES)
def test_it_names_the_files_that_differ(old: dict, new: dict) -> None:
    differ = {path for path in {*old, *new} if old.get(path) != new.get(path)}
    assert set(paths_of(make_patch(old, new))) == differ


LONG = "".join(f"line {n}\n" for n in range(60)).encode()


def test_git_applies_what_is_made(tmp_path) -> None:
    """Against the reference: several hunks, a new, an empty and a deleted file, no last newline."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    old = {"m.py": LONG, "gone.py": b"x\n", "end.py": b"a\nb", "sp ace.py": b"1\n"}
    new = {
        "m.py": LONG.replace(b"line 7\n", b"line seven\n").replace(b"line 50\n", b""),
        "new.py": b"fresh\n",
        "empty.py": b"",
        "end.py": b"a\nb\n",
        "sp ace.py": b"2",
    }
    for path, data in old.items():
        (tmp_path / path).write_bytes(data)
    patch = make_patch(old, new)
    subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"],
        cwd=tmp_path, input=patch.encode(), check=True,
        env={"PATH": "/usr/bin:/bin", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )  # fmt: skip
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == new
    assert len(parse_patch(patch)[3].hunks) == 2


def test_a_patch_that_git_made_applies(tmp_path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    new = LONG.replace(b"line 7\n", b"line seven\n") + b"tail"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/m.py").write_bytes(LONG)
    (tmp_path / "b/m.py").write_bytes(new)
    made = subprocess.run(
        ["git", "diff", "--no-index", "--no-prefix", "a/m.py", "b/m.py"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert apply_patch({"m.py": LONG}, made.stdout) == {"m.py": new}


CHANGE = "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"


@pytest.mark.parametrize(
    "patch",
    [
        CHANGE.replace("/x", "//x"),
        CHANGE.replace("/x", "/../x"),
        CHANGE.replace("/x", "/./x"),
        CHANGE.replace("/x", "/.git/hooks/x"),
        CHANGE.replace("b/x", "b/y"),
        CHANGE.replace("a/x", "/x"),
        CHANGE.replace("a/x", "x").replace("b/x", "x"),
        CHANGE.replace("-1 ", "-2 "),
        CHANGE.replace("-1 ", "-0 "),
        CHANGE.replace("-a", "-A"),
        CHANGE.replace("-1 ", "-1,2 "),
        CHANGE.replace("+1 ", "+1,2 "),
        CHANGE.replace("+b\n", "+b"),
        CHANGE + "+c\n",
        CHANGE + CHANGE,
        CHANGE + "rubbish\n",
        CHANGE.removesuffix("@@ -1 +1 @@\n-a\n+b\n"),
        "diff --git a/x b/x\nold mode 100644\nnew mode 100755\n",
        "diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n",
        "diff --git a/x b/x\nnew file mode 120000\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+/etc\n",
        "diff --git a/x b/x\nBinary files a/x and b/x differ\n",
        "diff --git a/x b/x\nGIT binary patch\nliteral 1\n",
        "diff --git a/x b/x\nindex 1..2 100644\n",
        "diff --git a/y b/y\n" + CHANGE,
        "--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+b\n",  # x is there already
        "--- a/x\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n",  # and has another line
        "--- a/none\n+++ b/none\n@@ -1 +1 @@\n-a\n+b\n",
        "--- a/binary\n+++ b/binary\n@@ -1 +1 @@\n-a\n+b\n",
        '--- "a/\\303x"\n+++ "b/\\303x"\n@@ -1 +1 @@\n-a\n+b\n',
        "--- a/x\n+++ b/x\n@@ -1 +1,2 @@\n-a\n+b\n\\ No newline at end of file\n+c\n",
        "\\ No newline at end of file\n",
        "just words\n",
        "\n",
    ],
)
def test_refused(patch: str) -> None:
    files = {"x": b"a\nz\n", "binary": b"\0\n"}
    with pytest.raises(PatchError):
        apply_patch(files, patch)


def test_the_unchanged_case_of_those_refused_applies() -> None:
    assert apply_patch({"x": b"a\nz\n"}, CHANGE) == {"x": b"b\nz\n"}


def test_overlapping_hunks_are_refused() -> None:
    patch = "--- a/x\n+++ b/x\n@@ -2 +2 @@\n-b\n+B\n@@ -1 +1 @@\n-a\n+A\n"
    with pytest.raises(PatchError):
        apply_patch({"x": b"a\nb\n"}, patch)


def test_binary_content_is_not_made_into_a_patch() -> None:
    with pytest.raises(PatchError):
        make_patch({"x": b"a\0"}, {"x": b"b"})
