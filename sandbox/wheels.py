"""Wheels that a release's tests need: pinned by hash, pure Python, unpacked beside the release.

Nothing is installed and nothing resolved: a pin names one file, and the file is a zip archive.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.paths import cache_dir
from sandbox.package_index import PackageIndex, pip_settings

FOLDER = ".requirements"
MAX_BYTES = 128 << 20
_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class Pin:
    """One wheel, named exactly."""

    name: str
    version: str
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Pin:
        """From a line of a requirements file. Raises InputError for anything but a pinned one."""
        found = _PIN.fullmatch(text)
        if found is None:
            raise InputError(f"{text!r} is not NAME==VERSION --hash=sha256:HEX")
        return cls(**found.groupdict())

    def __str__(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    @property
    def path(self) -> Path:
        """Where the wheel is cached."""
        return cache_dir() / "wheels" / f"{self.sha256}.whl"


def have_wheels(requirements: Iterable[str], index: PackageIndex | None = None) -> list[Pin]:
    """Have every wheel in the cache. Raises InputError for one that cannot be had as pinned."""
    pins = [Pin.parse(text) for text in requirements]
    for pin in pins:
        if pin.path.is_file():
            if hashlib.sha256(pin.path.read_bytes()).hexdigest() == pin.sha256:
                continue
            pin.path.unlink()
        index = index or PackageIndex(pip_settings())
        index.download_wheel(pin.name, pin.version, pin.sha256, pin.path)
    return pins


def unpack_wheels(requirements: Iterable[str], root: Path) -> None:
    """Unpack cached wheels into `root`'s folder `.requirements`.

    Raises InputError for an archive that is damaged, too large, or leads out of the folder.
    """
    target = root / FOLDER
    for pin in have_wheels(requirements):
        target.mkdir(exist_ok=True)
        try:
            with zipfile.ZipFile(pin.path) as archive:
                members = archive.infolist()
                if sum(member.file_size for member in members) > MAX_BYTES:
                    raise InputError(f"{pin}: unpacks to more than {MAX_BYTES} bytes")
                for member in members:
                    parts = member.filename.split("/")
                    if ".." in parts or member.filename.startswith("/") or "\\" in member.filename:
                        raise InputError(f"{pin}: holds {member.filename!r}, which leads out of it")
                    if not parts[0].endswith(".data") and not member.filename.endswith(".pth"):
                        archive.extract(member, target)
        except (zipfile.BadZipFile, OSError, RuntimeError) as error:
            raise InputError(f"{pin}: not a readable wheel: {error}") from error
