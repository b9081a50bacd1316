"""What a release's own change log says of it: the issue text of a mined task."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sandbox.layout import changelogs

MAX_CHARS = 1200
_VERSION = re.compile(r"(?<![\w.])v?(\d+(?:\.\d+)+(?:\.?(?:post|rc|a|b)\d+)?)(?![\w.]*\d)")
_LINK = re.compile(r"\(?https?://\S+\)?")
_RULE = re.compile(r"[-=~^_*#+\s]*")


def notes(root: Path, version: str) -> str:
    """The lines between the heading of `version` and the next one; "" when there are none.

    A heading is a line that names a version and little else, or a list item that begins with one.
    Code (fenced, or a diff) is left out: the notes tell what was wrong, not the patch.
    """
    for file in [*changelogs(root), *sorted(root.glob("README*"))]:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for heading in (_heading, _item):
            text = _section(lines, version, heading)
            if text:
                return text
    return ""


def _section(lines: list[str], version: str, heading: Callable[[str], str | None]) -> str:
    begin = next((i for i, line in enumerate(lines) if heading(line) == version), None)
    if begin is None:
        return ""
    section: list[str] = []
    if heading is _item:
        section.append(lines[begin].partition(version)[2].strip(" :-"))
    for line in lines[begin + 1 :]:
        if heading(line) is not None or (heading is _item and not line.strip()):
            break
        section.append(line)
    return _tidy(section)


def _item(line: str) -> str | None:
    """The version that a list item begins with (`- 1.2.3 Fixed …`)."""
    found = re.match(rf"[-*+]\s+{_VERSION.pattern}\s+\S", line)
    return found[1] if found else None


def _heading(line: str) -> str | None:
    """The version that a heading names; None if the line is no heading."""
    line = _LINK.sub("", line)
    found = _VERSION.search(line)
    if found is None or len(line) > 80 or line[:1].isspace() or line.startswith(("- ", "* ", "+ ")):
        bare = line.strip("*# ")
        if found is None or _VERSION.fullmatch(bare) is None:
            return None
    words = re.findall(r"[A-Za-z]{2,}", line.replace(found[0], ""))
    return found[1] if len(words) <= 5 and found.start() <= 40 else None


def _tidy(lines: list[str]) -> str:
    kept: list[str] = []
    fenced, size = False, 0
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if fenced or _RULE.fullmatch(line) or line.startswith(("@@", "+++", "---")):
            continue
        size += len(line) + 1
        if size > MAX_CHARS:
            break
        kept.append(line.rstrip())
    return "\n".join(kept).strip()
