"""The packages that tasks are made from: pinned, fetched once, unpacked once.

`sandbox/index/packages.toml` ships with remend and holds only facts (names, versions, hashes,
licences, folders); the code itself comes from the package index, by hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tomllib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_atomic
from configs.paths import cache_dir
from sandbox.base import SandboxBroken
from sandbox.local import LocalPool, prebuild
from sandbox.package_index import PackageIndex, pip_settings
from sandbox.unpack import unpack_sdist
from sandbox.wheels import unpack_wheels

INDEX = Path(__file__).parent / "index"


@dataclass(frozen=True)
class Release:
    """One source archive, named exactly.

    `requirements` are wheels that its tests need, `name==version --hash=sha256:…` each, unpacked
    into the tree's folder `.requirements`. A `carried` one is on no index: the directory of an
    imported task holds it.
    """

    name: str
    version: str
    sha256: str
    requirements: tuple[str, ...] = field(default=(), kw_only=True)
    # not in the repr, which names measurements that are kept
    carried: bool = field(default=False, kw_only=True, repr=False)

    @property
    def archive(self) -> Path:
        """Where the sdist is cached."""
        return cache_dir() / "sdists" / f"{self.name}-{self.version}.tar.gz"

    @property
    def tree(self) -> Path:
        """Where the pristine unpacked tree lies."""
        stamp = self.sha256[:8]
        if self.requirements:
            stamp += "-" + hashlib.sha256("\n".join(self.requirements).encode()).hexdigest()[:8]
        return cache_dir() / "trees" / f"{self.name}-{self.version}-{stamp}"

    def finish(self, root: Path) -> None:
        """What is done once to a fresh tree: the wheels it needs are put beside it."""
        unpack_wheels(self.requirements, root)

    def make_ready(self) -> None:
        """What else its tree, which is in the cache, wants before tests are run in it."""


@dataclass(frozen=True)
class Package(Release):
    """A release that tasks are made from.

    `source` and `tests` are folders or files relative to the unpacked tree, `python_path` what is
    put before `sys.path` to run its tests from source. `skip` holds test files that are left out
    (they need packages that are not there).
    """

    licence: str
    split: str
    source: tuple[str, ...]
    tests: tuple[str, ...]
    python_path: tuple[str, ...]
    skip: tuple[str, ...] = ()

    def make_ready(self) -> None:
        """Compile its modules and its tests, in a sandbox, once: every later test run is faster.

        Not while the tree is unpacked: it may have been there as a plain release, to be read.
        """
        root = self.tree
        mark = root.with_name(f"{root.name}.compiled")
        if mark.exists():
            return
        tests: list[str] = []
        for entry in self.tests:
            found = sorted((root / entry).rglob("test_*.py")) or [root / entry]
            tests += [path.relative_to(root).as_posix() for path in found]

        async def compile_all() -> None:
            async with LocalPool(1) as pool:
                with contextlib.suppress(SandboxBroken):  # then they are only slower
                    await prebuild(root, self.python_path, tests, pool)

        # the caller may have an event loop of its own
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(asyncio.run, compile_all()).result()
        write_atomic(mark, "")


@cache
def load_packages(path: Path = INDEX / "packages.toml") -> dict[str, Package]:
    """The pinned packages by name. Raises InputError for a damaged index."""
    try:
        with open(path, "rb") as file:
            rows = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot read the package index: {error}") from error
    known = {field.name for field in fields(Package)}
    packages = {}
    for name, row in rows.items():
        missing = known - {"name", "skip", "requirements", "carried"} - set(row)
        if missing or set(row) - known:
            wrong = sorted(missing or set(row) - known)
            raise InputError(f"{path}: package {name}: missing or unknown keys {wrong}")
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in row.items()
        }
        packages[name] = Package(name=name, **values)
    return packages


def fetch(
    releases: Iterable[Release], done: Callable[[Release], None] = lambda release: None
) -> None:
    """Have every release's pristine tree in the cache; what is there already needs no network.

    Downloads run side by side. `done` is called once for each release. Raises InputError for the
    first one that cannot be had.
    """
    wanted = list(dict.fromkeys(releases))
    missing = [release for release in wanted if not release.tree.is_dir()]
    for release in wanted:
        if release not in missing:
            release.make_ready()
            done(release)
    if not missing:
        return
    absent = [release for release in missing if not _cached(release)]
    for release in absent:
        if release.carried:
            raise InputError(
                f"{release.name} {release.version} is on no index: its tree is in the directory of "
                "its task, which must be loaded first"
            )
    index = PackageIndex(pip_settings()) if absent else None

    def work(release: Release) -> Release:
        if index is not None and release in absent:
            index.download(release.name, release.version, release.sha256, release.archive)
        unpack_sdist(release.archive, release.tree, release.finish)
        release.make_ready()
        return release

    with ThreadPoolExecutor(max_workers=4) as pool:
        jobs = [pool.submit(work, release) for release in missing]
        try:
            for job in as_completed(jobs):
                done(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def adopt(release: Release, archive: Path) -> None:
    """Use a local copy of the sdist, so that no index is asked for it.

    Raises InputError when the copy is not the pinned file.
    """
    if release.tree.is_dir():
        release.make_ready()
        return
    if not _cached(release):
        data = archive.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != release.sha256:
            raise InputError(
                f"{archive}: sha256 is {digest}, but {release.sha256} is pinned for "
                f"{release.name} {release.version}"
            )
        write_atomic(release.archive, data)
    unpack_sdist(release.archive, release.tree, release.finish)
    release.make_ready()


def _cached(release: Release) -> bool:
    """Is the right sdist there? One with another hash is removed: it must not be used."""
    if not release.archive.is_file():
        return False
    if hashlib.sha256(release.archive.read_bytes()).hexdigest() == release.sha256:
        return True
    release.archive.unlink()
    return False
