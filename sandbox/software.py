"""Other software of this machine that may hold a good copy of what is under repair.

Tools of all kinds bring Python packages along, in folders that a sandbox sees with the rest of
`/usr`. Who has a shell there could copy a function that is to be repaired from one of them.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from functools import cache

_PLACES = ("/usr", *(f"/usr/{x}" for x in ("lib", "libexec", "share", "local")))
_PLACES += ("/usr/local/lib", "/usr/local/share")
# programs, and the modules of the machine's own Python; what is installed for it is none of those
_KEPT = re.compile(r"s?bin|python3(\.\d+)?")
_INSTALLED = ("dist-packages", "site-packages")
_CODE = (".py", ".whl", ".egg", ".zip")


@cache
def other_software() -> tuple[str, ...]:
    """Folders below `/usr` that hold Python modules or archives of them and are no part of this
    interpreter, and the wheels that come with it."""
    own = {os.path.realpath(sys.base_prefix), os.path.realpath(sysconfig.get_path("stdlib"))}
    found = []
    for place in filter(os.path.isdir, _PLACES):
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.path in _PLACES or not entry.is_dir(follow_symlinks=False):
                    continue
                needed = any(f"{path}/".startswith(f"{entry.path}/") for path in own)
                if _KEPT.fullmatch(entry.name):
                    installed = (f"{entry.path}/{name}" for name in _INSTALLED)
                    found += [p for p in installed if os.path.isdir(p) and not os.path.islink(p)]
                elif not needed and _holds_code(entry.path):
                    found.append(entry.path)
    bundled = os.path.join(os.path.realpath(sysconfig.get_path("stdlib")), "ensurepip", "_bundled")
    return (*found, *([bundled] if os.path.isdir(bundled) else []))


def _holds_code(folder: str) -> bool:
    return any(name.endswith(_CODE) for _, _, names in os.walk(folder) for name in names)
