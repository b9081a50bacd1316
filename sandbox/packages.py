"""The packages that tasks are made from: pinned, fetched once, unpacked once.

`sandbox/index/packages.toml` ships with remend and holds only facts (names, versions, hashes,
licences, folders); the code itself comes from the package index, by hash.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from configs.errors import InputError
from configs.paths import cache_dir
from sandbox.package_index import PackageIndex, pip_settings
from sandbox.unpack import unpack_sdist

INDEX = Path(__file__).parent / "index"


@dataclass(frozen=True)
class Package:
    """One pinned source release.

    `source` and `tests` are folders or files relative to the unpacked tree, `python_path` what is
    put before `sys.path` to run its tests from source. `skip` holds pytest ids or id prefixes that
    are left out (they need the network, a clock, …).
    """

    name: str
    version: str
    sha256: str
    licence: str
    split: str
    source: tuple[str, ...]
    tests: tuple[str, ...]
    python_path: tuple[str, ...]
    skip: tuple[str, ...] = ()

    @property
    def archive(self) -> Path:
        """Where the sdist is cached."""
        return cache_dir() / "sdists" / f"{self.name}-{self.version}.tar.gz"

    @property
    def tree(self) -> Path:
        """Where the pristine unpacked tree lies."""
        return cache_dir() / "trees" / f"{self.name}-{self.version}-{self.sha256[:8]}"


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
        missing = known - {"name", "skip"} - set(row)
        if missing or set(row) - known:
            wrong = sorted(missing or set(row) - known)
            raise InputError(f"{path}: package {name}: missing or unknown keys {wrong}")
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        packages[name] = Package(name=name, **values)
    return packages


def fetch(
    packages: Iterable[Package], done: Callable[[Package], None] = lambda package: None
) -> None:
    """Have every package's pristine tree in the cache; what is there already needs no network.

    Downloads run side by side. `done` is called once for each package. Raises InputError for the
    first package that cannot be had.
    """
    wanted = list(dict.fromkeys(packages))
    missing = [package for package in wanted if not package.tree.is_dir()]
    for package in wanted:
        if package not in missing:
            done(package)
    if not missing:
        return
    absent = [package for package in missing if not _cached(package)]
    index = PackageIndex(pip_settings()) if absent else None

    def work(package: Package) -> Package:
        if index is not None and package in absent:
            index.download(package.name, package.version, package.sha256, package.archive)
        unpack_sdist(package.archive, package.tree)
        return package

    with ThreadPoolExecutor(max_workers=8) as pool:
        jobs = [pool.submit(work, package) for package in missing]
        try:
            for job in as_completed(jobs):
                done(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cached(package: Package) -> bool:
    """Is the right sdist there? One with another hash is removed: it must not be used."""
    if not package.archive.is_file():
        return False
    if hashlib.sha256(package.archive.read_bytes()).hexdigest() == package.sha256:
        return True
    package.archive.unlink()
    return False
