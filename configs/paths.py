"""Where remend keeps what it fetched or unpacked."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache root: `$REMEND_CACHE`, else `~/.cache/remend`. Absolute; not created here."""
    chosen = os.environ.get("REMEND_CACHE") or "~/.cache/remend"
    return Path(chosen).expanduser().absolute()
