"""Fetching pinned source archives from the package index that pip itself is set up for.

Nothing is built and nothing of a package is run: the archive is found, streamed, hashed and kept
only when its SHA-256 is the pinned one.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError

if TYPE_CHECKING:
    from unearth import Link


class IndexUnreachable(InputError):
    """The index did not answer: no fact about any package."""


MAX_ARCHIVE_BYTES = 64 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class IndexSettings:
    """Where to look for packages and how to connect; the fields are pip's options."""

    index_urls: tuple[str, ...] = ("https://pypi.org/simple",)
    find_links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    proxy: str | None = None
    timeout_s: float = 15.0


def pip_settings() -> IndexSettings:
    """What pip would use: its configuration files and `PIP_*` variables, read through pip.

    Local indexes that do not exist are left out, as pip ignores them too.
    """
    values = {
        key[4:].lower().replace("_", "-"): value
        for key, value in os.environ.items()
        if key.startswith("PIP_")
    }
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for line in listing.splitlines():
        match = re.fullmatch(r"(?:global|download|install)\.([\w-]+)=(.*)", line.strip())
        if match:
            # variables win over files, as in pip
            values.setdefault(match[1].replace("_", "-"), str(ast.literal_eval(match[2])))
    indexes = [values.get("index-url", "https://pypi.org/simple")]
    indexes += values.get("extra-index-url", "").split()
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    return IndexSettings(
        tuple(url for url in indexes if _reachable(url)),
        tuple(url for url in values.get("find-links", "").split() if _reachable(url)),
        tuple(values.get("trusted-host", "").split()),
        values.get("cert"),
        values.get("proxy"),
        float(values.get("default-timeout", values.get("timeout", "15"))),
    )


def _reachable(url: str) -> bool:
    path = url.removeprefix("file://")
    return "://" in path or os.path.exists(path)


@dataclass(frozen=True)
class Listed:
    """One sdist or wheel as an index lists it. `sha256` and `uploaded`, a date (YYYY-MM-DD), are ""
    where the index does not say."""

    version: str
    sha256: str
    uploaded: str


def _date(link: Link) -> str:
    return link.upload_time.date().isoformat() if link.upload_time else ""


class PackageIndex:
    """A connection to the configured indexes. Threads may share it."""

    def __init__(self, settings: IndexSettings) -> None:
        from unearth.auth import MultiDomainBasicAuth
        from unearth.fetchers.sync import PyPIClient

        self.settings = settings
        self._wheels: dict[str, list[Listed]] = {}
        # a missing page is told to the caller, in one error: not to the log as well
        logging.getLogger("unearth").setLevel(logging.ERROR)
        verify: ssl.SSLContext | bool = True
        if settings.cert:
            folder = os.path.isdir(settings.cert)
            verify = ssl.create_default_context(
                cafile=None if folder else settings.cert, capath=settings.cert if folder else None
            )
        # typed loosely: it fits unearth's own Fetcher protocol only in spirit
        self.client: Any = PyPIClient(
            trusted_hosts=settings.trusted_hosts,
            verify=verify,
            timeout=settings.timeout_s,
            proxy=settings.proxy,
            follow_redirects=True,
        )
        self.client.auth = MultiDomainBasicAuth(prompting=False, index_urls=settings.index_urls)

    def download(self, name: str, version: str, sha256: str, target: Path) -> None:
        """Put the sdist of `name==version` at `target`: the whole file or nothing.

        Raises InputError when the index has no such sdist, has withdrawn it, cannot be reached, or
        gives a file with another SHA-256.
        """
        self._download(self._find(name, version), f"{name} {version}: the sdist", sha256, target)

    def wheels(self, name: str) -> list[Listed]:
        """Every wheel of a package that runs on any machine with this Python, newest first.

        Raises InputError when no index can be reached; a name that none knows has none.
        """
        if name not in self._wheels:
            self._wheels[name] = [
                Listed(version, (link.hashes or {}).get("sha256", ""), _date(link))
                for link, version in self._links(name, f"wheels of {name}", wheels=True)
                if link.filename.endswith("-none-any.whl") and not link.is_yanked
            ]
        return self._wheels[name]

    def download_wheel(self, name: str, version: str, sha256: str, target: Path) -> None:
        """As `download`, for the pure-Python wheel of that hash."""
        for link, text in self._links(name, f"{name} {version}", wheels=True):
            listed = (link.hashes or {}).get("sha256", sha256)
            if text == version and listed == sha256 and link.filename.endswith("-none-any.whl"):
                if link.is_yanked:
                    reason = link.yank_reason or "no reason given"
                    raise InputError(f"{name} {version} was withdrawn from the index: {reason}")
                self._download(link, f"{name} {version}: the wheel", sha256, target)
                return
        raise InputError(f"the package index has no such wheel of {name} {version}")

    def _download(self, link: Link, what: str, sha256: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.parent / f".{target.name}.{os.getpid()}.part"
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    digest = self._stream(link, part, what)
                    break
                except InputError:
                    raise
                except Exception as error:  # the client's error classes vary with unearth's version
                    if attempt == _ATTEMPTS:
                        raise IndexUnreachable(
                            f"{what} could not be downloaded from {link.redacted}: {error}"
                        ) from error
            if digest != sha256:
                raise InputError(
                    f"{what} has sha256 {digest}, but {sha256} is pinned; "
                    "it was not kept (check the index, or the pin)"
                )
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def listing(self, name: str) -> list[Listed]:
        """Every sdist (`.tar.gz`) of a package that is not withdrawn, oldest version first.

        Of versions that several indexes have, the first index's counts. Raises InputError when no
        index knows the name, or none can be reached.
        """
        from packaging.version import InvalidVersion, Version

        found: dict[Version, Listed] = {}
        for link, text in self._links(name, "any version of " + name):
            try:
                version = Version(text)
            except InvalidVersion:
                continue
            digest = (link.hashes or {}).get("sha256") or (link.hash or "=").partition("=")[2]
            if link.filename.endswith(".tar.gz") and not link.is_yanked:
                found.setdefault(version, Listed(text, digest, _date(link)))
        if not found:
            raise InputError(f"the package index has no sdist (.tar.gz) of {name}")
        return [found[version] for version in sorted(found)]

    def _find(self, name: str, version: str) -> Link:
        from packaging.version import InvalidVersion, Version

        wanted = f"{name} {version}"
        other_versions: set[str] = set()
        for link, text in self._links(name, wanted):
            try:
                same = Version(text) == Version(version)
            except InvalidVersion:
                continue
            other_versions.add(text)
            if not same or not link.filename.endswith(".tar.gz"):
                continue
            if link.is_yanked:
                reason = link.yank_reason or "no reason given"
                raise InputError(f"{wanted} was withdrawn from the index: {reason}")
            return link
        known = f"it has {len(other_versions)} other versions" if other_versions else "no such name"
        raise InputError(f"the package index has no sdist (.tar.gz) of {wanted}: {known}")

    def _links(self, name: str, wanted: str, wheels: bool = False) -> Iterator[tuple[Link, str]]:
        """Sdists (or wheels that fit this machine) of a package, each with its version, newest
        first, index after index.

        Raises InputError, at its end, if an index could not be reached.
        """
        from unearth import PackageFinder

        sources: list[tuple[tuple[str, ...], tuple[str, ...]]]
        sources = [((url,), ()) for url in self.settings.index_urls]
        sources += [((), (url,)) for url in self.settings.find_links]
        if not sources:
            raise InputError(f"{wanted} is not cached, and pip is set up with no index at all")
        failures: list[str] = []
        for index_urls, find_links in sources:
            finder = PackageFinder(
                self.client,
                index_urls=index_urls,
                find_links=find_links,
                trusted_hosts=self.settings.trusted_hosts,
                ignore_compatibility=not wheels,
                only_binary=[":all:"] if wheels else [],
                no_binary=[] if wheels else [":all:"],
            )
            try:
                found = list(finder.find_all_packages(name, allow_yanked=True))
            except Exception as error:  # see download()
                failures.append(f"{type(error).__name__}: {error}")
                continue
            yield from ((package.link, package.version or "") for package in found)
        if failures:
            raise IndexUnreachable(f"could not reach the package index for {wanted}: {failures[0]}")

    def _stream(self, link: Link, part: Path, what: str) -> str:
        """Write the archive aside and return its SHA-256."""
        digest, size = hashlib.sha256(), 0
        with self.client.get_stream(link.normalized) as response, open(part, "wb") as file:
            if response.status_code >= 400:
                raise OSError(f"status {response.status_code}")
            for chunk in response.iter_bytes():
                size += len(chunk)
                if size > MAX_ARCHIVE_BYTES:
                    raise InputError(f"{what} is larger than {MAX_ARCHIVE_BYTES} bytes")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()
