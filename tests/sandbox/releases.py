"""Small source archives for tests."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping


def sdist(files: Mapping[str, str], top: str = "mini-1.0") -> bytes:
    """An sdist with these files; the same files give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return gzip.compress(buffer.getvalue(), mtime=0)
