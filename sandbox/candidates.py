"""The packages that real bugs are mined from, with the releases to compare: facts, and no code.

`sandbox/index/candidates.jsonl` holds one line for each package, quickest test suites first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import iter_jsonl, write_jsonl
from sandbox.package_index import PackageIndex
from sandbox.packages import INDEX, Release, load_packages

CANDIDATES = INDEX / "candidates.jsonl"
OLDEST = "2017-06-01"  # before that, few releases run on a Python of today
_FINAL = re.compile(r"\d+(\.\d+)*(\.post\d+)?")
_HELDOUT_OF_4 = "0123"  # first hexadecimal digit of a name's hash: a quarter of all packages


@dataclass(frozen=True)
class Dated:
    """One release of a list: version, SHA-256 of its sdist, date (YYYY-MM-DD)."""

    version: str
    sha256: str
    uploaded: str


@dataclass(frozen=True)
class Candidate:
    """A package to be mined. `skip`: test files to leave out; `extra`: what its tests need that it
    does not name, as requirements."""

    name: str
    split: str
    releases: tuple[Dated, ...]
    skip: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two adjacent releases of a package."""

    candidate: Candidate
    old: Dated
    new: Dated

    @property
    def name(self) -> str:
        return f"{self.candidate.name}-{self.old.version}-{self.new.version}"

    def release(self, which: Dated) -> Release:
        return Release(self.candidate.name, which.version, which.sha256)


def read_candidates(path: Path = CANDIDATES) -> list[Candidate]:
    """The list. Raises InputError, naming the line, for a damaged one."""
    found: list[Candidate] = []
    for number, row in enumerate(iter_jsonl(path), start=1):
        try:
            releases = tuple(Dated(*release) for release in row.pop("releases"))
            skip, extra = (tuple(row.pop(key, ())) for key in ("skip", "extra"))
            found.append(Candidate(**row, releases=releases, skip=skip, extra=extra))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a package to be mined: {error}") from None
        if found[-1].split not in ("train", "heldout"):
            raise InputError(f"{path}:{number}: split {found[-1].split!r} is not train or heldout")
    return found


def write_candidates(path: Path, candidates: Iterable[Candidate]) -> None:
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = {"name": candidate.name, "split": candidate.split}
        row |= {key: list(v) for key in ("skip", "extra") if (v := getattr(candidate, key))}
        row["releases"] = [list(asdict(release).values()) for release in candidate.releases]
        rows.append(row)
    write_jsonl(path, rows)


def candidate_from(index: PackageIndex, name: str, known: Candidate | None = None) -> Candidate:
    """List a package's releases anew: final ones since `OLDEST` whose hash the index tells.

    Raises InputError when the index does not have the package.
    """
    releases = tuple(
        Dated(listed.version, listed.sha256, listed.uploaded)
        for listed in index.listing(name)
        if _FINAL.fullmatch(listed.version)
        and listed.sha256
        and (not listed.uploaded or listed.uploaded >= OLDEST)
    )
    if known is not None:
        return Candidate(name, known.split, releases, known.skip, known.extra)
    return Candidate(name, split_of(name), releases)


def split_of(name: str) -> str:
    """Whole packages are trained on or held out; the choice never changes."""
    known = load_packages().get(name)
    if known is not None:
        return known.split
    heldout = hashlib.sha256(name.encode()).hexdigest()[0] in _HELDOUT_OF_4
    return "heldout" if heldout else "train"


def pairs(candidates: Iterable[Candidate], newest: int | None = None) -> list[Pair]:
    """Adjacent pairs, every package's newest first, then every one's second newest, …"""
    ranked: list[tuple[int, int, Pair]] = []
    for place, candidate in enumerate(candidates):
        found = list(zip(candidate.releases, candidate.releases[1:], strict=False))[::-1]
        for rank, (old, new) in enumerate(found[:newest]):
            ranked.append((rank, place, Pair(candidate, old, new)))
    return [pair for _, _, pair in sorted(ranked, key=lambda item: item[:2])]
