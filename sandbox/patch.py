"""Unified diffs: made from two states of some files, and applied exactly or not at all.

No fuzz, no offsets: a hunk fits at the line it names or the patch is refused. The format is what
`git diff` writes for text files (`a/` and `b/` prefixes), so `git apply` and `patch -p1` take ours.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import InputError

CONTEXT = 3
_NO_NEWLINE = "\\ No newline at end of file"
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_REFUSED = (
    *("old mode", "new mode", "rename ", "copy ", "similarity ", "dissimilarity "),
    *("Binary files ", "GIT binary patch"),
)

Files = Callable[[str], bytes | None] | Mapping[str, bytes]


class PatchError(InputError):
    """A patch that is not one, that asks for what patches may not do here, or that does not fit."""


class BeyondText(PatchError):
    """A patch that renames, copies, changes modes or binary files: whole, but not for here."""


@dataclass(frozen=True)
class Hunk:
    """`start` is the 0-based index, in the old file, of the first line of `old`."""

    start: int
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True)
class FileChange:
    """What a patch does to one file."""

    path: str
    creates: bool
    deletes: bool
    hunks: tuple[Hunk, ...]


def check_path(path: str) -> str:
    """`path` if it is a plain relative path that stays below its root; raises PatchError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or parts[0] == ".git":
        raise PatchError(f"patch path {path!r} must be relative, and stay in the tree")
    if any(ord(char) < 32 or char in '"\\\x7f' for char in path):
        raise PatchError(f"patch path {path!r} has characters that patches cannot carry")
    return path


def is_text(data: bytes) -> bool:
    """Whether a diff can carry this content: UTF-8 without NUL bytes."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


# -- making


def make_patch(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> str:
    """The patch that turns `old` into `new`; a path that is missing on one side has no file there.

    Raises PatchError for binary content or for a path that a patch cannot name.
    """
    return "".join(
        _file_patch(path, old.get(path), new.get(path))
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path)
    )


def _file_patch(path: str, old: bytes | None, new: bytes | None) -> str:
    check_path(path)
    for data in (old, new):
        if data is not None and not is_text(data):
            raise PatchError(f"{path} is not text, so no diff can carry it")
    out = [f"diff --git a/{path} b/{path}\n"]
    if old is None:
        out.append("new file mode 100644\n")
    if new is None:
        out.append("deleted file mode 100644\n")
    a, b = split_lines(old), split_lines(new)
    if a or b:
        # as git does, a tab ends a name that holds a space
        tab = "\t" if " " in path else ""
        out.append(f"--- a/{path}{tab}\n" if old is not None else "--- /dev/null\n")
        out.append(f"+++ b/{path}{tab}\n" if new is not None else "+++ /dev/null\n")
    for group in _groups(opcodes(a, b)):
        (_, a0, _, b0, _), (_, _, a1, _, b1) = group[0], group[-1]
        out.append(f"@@ -{_range(a0, a1)} +{_range(b0, b1)} @@\n")
        for tag, i0, i1, j0, j1 in group:
            if tag == "equal":
                out += [_line(" ", text) for text in a[i0:i1]]
            else:
                out += [_line("-", text) for text in a[i0:i1]]
                out += [_line("+", text) for text in b[j0:j1]]
    return "".join(out)


Opcode = tuple[str, int, int, int, int]


def opcodes(a: Sequence[str], b: Sequence[str]) -> list[Opcode]:
    """As `difflib`, but the ends that are alike, mostly nearly all, are not searched."""
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    middle = difflib.SequenceMatcher(None, a[head : len(a) - tail], b[head : len(b) - tail])
    codes: list[Opcode] = [("equal", 0, head, 0, head)] if head else []
    codes += [
        (tag, i0 + head, i1 + head, j0 + head, j1 + head)
        for tag, i0, i1, j0, j1 in middle.get_opcodes()
    ]
    if tail:
        codes.append(("equal", len(a) - tail, len(a), len(b) - tail, len(b)))
    return codes


def _groups(codes: Sequence[Opcode]) -> Iterable[list[Opcode]]:
    """Split at long stretches of equal lines, and keep `CONTEXT` of them around each change."""
    group: list[Opcode] = []
    for index, (tag, i0, i1, j0, j1) in enumerate(codes):
        if tag != "equal":
            group.append((tag, i0, i1, j0, j1))
            continue
        first, last = index == 0, index == len(codes) - 1
        before = 0 if first else min(CONTEXT, i1 - i0)
        after = 0 if last else min(CONTEXT, i1 - i0)
        if not first and not last and i1 - i0 <= 2 * CONTEXT:
            group.append((tag, i0, i1, j0, j1))
            continue
        if group:
            group.append((tag, i0, i0 + before, j0, j0 + before))
            yield group
        group = [(tag, i1 - after, i1, j1 - after, j1)]
    if any(code[0] != "equal" for code in group):
        yield group


def split_lines(data: bytes | None) -> list[str]:
    """Lines with their ends, split at line feeds only (a diff's own rule)."""
    text = (data or b"").decode("utf-8")
    return [line for line in re.split(r"(?<=\n)", text) if line]


def _line(mark: str, text: str) -> str:
    return mark + text if text.endswith("\n") else f"{mark}{text}\n{_NO_NEWLINE}\n"


def _range(start: int, stop: int) -> str:
    """A hunk header's `start,count`; an empty range names the line before it."""
    count = stop - start
    if count == 1:
        return str(start + 1)
    return f"{start + 1 if count else start},{count}"


# -- reading and applying


def parse_patch(patch: str) -> list[FileChange]:
    """The changes in a patch, one for each file; raises PatchError, naming the line."""
    return _Parser(patch).parse()


def paths_of(patch: str) -> list[str]:
    """The files that a patch touches, in its order."""
    return [change.path for change in parse_patch(patch)]


def apply_patch(files: Files, patch: str) -> dict[str, bytes | None]:
    """New contents of every file that the patch touches, None for a deleted one.

    `files` gives present contents by path (None, or no key: there is no such file). Raises
    PatchError, with nothing applied, if any hunk does not fit exactly.
    """
    return apply_changes(files, parse_patch(patch))


def apply_changes(files: Files, changes: Iterable[FileChange]) -> dict[str, bytes | None]:
    """As `apply_patch`, for changes already read."""
    look_up = files if callable(files) else files.get
    return {change.path: _apply(change, look_up(change.path)) for change in changes}


def _apply(change: FileChange, data: bytes | None) -> bytes | None:
    if change.creates != (data is None):
        state = "exists already" if change.creates else "does not exist"
        raise PatchError(f"patch does not apply: {change.path} {state}")
    if not is_text(data or b""):
        raise PatchError(f"patch does not apply: {change.path} is not text")
    old = split_lines(data)
    new: list[str] = []
    at = 0
    for hunk in change.hunks:
        end = hunk.start + len(hunk.old)
        # a hunk with neither context nor removed lines can only mean an empty file
        blind = old and not hunk.old
        if blind or hunk.start < at or tuple(old[hunk.start : end]) != hunk.old:
            raise PatchError(f"patch does not apply: {change.path}, line {hunk.start + 1}")
        new += old[at : hunk.start]
        new += hunk.new
        at = end
    new += old[at:]
    if any(not line.endswith("\n") for line in new[:-1]):
        raise PatchError(f"patch does not apply: {change.path} has no newline at its old end")
    if change.deletes:
        if new:
            raise PatchError(f"patch does not apply: {change.path} is not empty after deletion")
        return None
    return "".join(new).encode("utf-8")


class _Parser:
    def __init__(self, patch: str) -> None:
        self._lines = [line for line in re.split(r"(?<=\n)", patch) if line]
        self._at = 0
        self._last = ""  # mark of the line read last

    def parse(self) -> list[FileChange]:
        changes: dict[str, FileChange] = {}
        while self._at < len(self._lines):
            change = self._file()
            if change.path in changes:
                raise PatchError(f"patch has two parts for {change.path}")
            changes[change.path] = change
        return list(changes.values())

    def _peek(self) -> str:
        """The next line without its end; "" past the last."""
        return self._lines[self._at].removesuffix("\n") if self._at < len(self._lines) else ""

    def _wrong(self, what: str, kind: type[PatchError] = PatchError) -> PatchError:
        return kind(f"patch, line {self._at + 1}: {what}: {self._peek()[:80]!r}")

    def _file(self) -> FileChange:
        named: str | None = None
        creates = deletes = False
        if self._peek().startswith("diff --git "):
            named = self._git_name(self._peek().removeprefix("diff --git "))
            self._at += 1
            while self._at < len(self._lines) and not self._peek().startswith(("--- ", "diff ")):
                line = self._peek()
                if line.startswith(_REFUSED):
                    raise self._wrong("only changes of text are allowed", BeyondText)
                if line.startswith(("new file mode ", "deleted file mode ")):
                    creates, deletes = line.startswith("new"), line.startswith("deleted")
                    if creates and not line.endswith(" 100644"):
                        raise self._wrong("a new file must be an ordinary one", BeyondText)
                elif not line.startswith("index "):
                    raise self._wrong("not a line of a patch's header")
                self._at += 1
        if not self._peek().startswith("--- "):
            if named is None:
                raise self._wrong("expected `diff --git` or `---`")
            if not creates and not deletes:
                raise self._wrong(f"nothing is said to change in {named}")
            return FileChange(named, creates, deletes, ())
        old = self._name("--- ", "a/")
        new = self._name("+++ ", "b/")
        path = new or old
        if path is None or (old is not None and new is not None and old != new):
            raise self._wrong("old and new name differ")
        if named is not None and (path != named or creates != (old is None)):
            raise self._wrong("header and names disagree")
        hunks = []
        while self._peek().startswith("@@ "):
            hunks.append(self._hunk())
        if not hunks:
            raise self._wrong("expected a hunk")
        return FileChange(path, old is None, new is None, tuple(hunks))

    def _git_name(self, names: str) -> str:
        """`a/NAME b/NAME`, both the same, so that spaces in them do no harm."""
        half = (len(names) - 1) // 2
        old, new = names[:half], names[half + 1 :]
        if not old.startswith("a/") or not new.startswith("b/") or old[2:] != new[2:]:
            raise self._wrong("expected the same name twice, as a/NAME b/NAME", BeyondText)
        return check_path(old[2:])

    def _name(self, mark: str, prefix: str) -> str | None:
        line = self._peek()
        if not line.startswith(mark):
            raise self._wrong(f"expected `{mark.strip()}`")
        name = line.removeprefix(mark).partition("\t")[0]
        if name == "/dev/null":
            self._at += 1
            return None
        if not name.startswith(prefix):
            raise self._wrong(f"expected a name that starts with {prefix}")
        self._at += 1
        return check_path(name.removeprefix(prefix))

    def _hunk(self) -> Hunk:
        match = _HUNK.match(self._peek())
        if match is None:
            raise self._wrong("not a hunk header")
        start, old_left, _, new_left = (1 if n is None else int(n) for n in match.groups())
        if old_left and not start:
            raise self._wrong("lines count from 1")
        first = start - 1 if old_left else start
        self._at += 1
        self._last = ""
        old: list[str] = []
        new: list[str] = []
        while old_left or new_left or self._peek().startswith("\\"):
            if self._at >= len(self._lines):
                raise PatchError("patch ends within a hunk")
            line = self._lines[self._at]
            mark, text = line[:1], line[1:]
            if mark == "\\":
                self._no_newline(old, new)
            elif mark in " -+" and text.endswith("\n"):
                if mark != "+":
                    old.append(text)
                    old_left -= 1
                if mark != "-":
                    new.append(text)
                    new_left -= 1
                if old_left < 0 or new_left < 0:
                    raise self._wrong("more lines than the hunk's header says")
                self._last = mark
            else:
                raise self._wrong("not a line of a hunk")
            self._at += 1
        return Hunk(first, tuple(old), tuple(new))

    def _no_newline(self, old: list[str], new: list[str]) -> None:
        """The line before has no newline."""
        sides = {"-": (old,), "+": (new,), " ": (old, new)}.get(self._last, ())
        if not sides or any(not side for side in sides):
            raise self._wrong("nothing before it")
        for side in sides:
            side[-1] = side[-1].removesuffix("\n")
