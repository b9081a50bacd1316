"""Environments for peers: a venv each, since their pins exclude each other."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.errors import InputError
from tools.bench.peer import SCRIPTS

PINS = ("transformers", "tunix", "maxtext", "easydel")  # peers with a requirements file
NEEDS_312 = "maxtext"
DONE = "remend-bench-pins"  # in a finished environment: the hash of the pins that it has


def install(
    folder: Path, names: Sequence[str], python312: Path | None, say: Callable[[str], None]
) -> dict[str, Path]:
    """Make what is missing of the environments `folder`/NAME; interpreters by peer.

    A peer that needs a Python which is not here is left out. `say` gets lines for a person.

    Raises:
      InputError: pip failed; the message has its last line.
    """
    newer = _python312(python312) if NEEDS_312 in names else None
    pythons = {}
    for name in (name for name in PINS if name in names):
        if name == NEEDS_312 and newer is None:
            say(f"{name} needs Python 3.12 or newer: --python312 PATH")
            continue
        pythons[name] = python = folder.absolute() / name / "bin" / "python"
        pins = SCRIPTS / f"{name}.txt"
        done, mark = folder / name / DONE, hashlib.sha256(pins.read_bytes()).hexdigest()
        if done.is_file() and done.read_text() == mark:
            continue
        say(f"{name}: installing what {pins.name} lists; {folder / name}.log tells how it goes")
        shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        base = newer if name == NEEDS_312 and newer else Path(sys.executable)
        _run([str(base), "-m", "venv", str(folder / name)], folder / f"{name}.log")
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        # MaxText's list is whole, and its wheel declares no dependencies that pip could add
        whole = ["--no-deps"] if name == NEEDS_312 else []
        _run([*pip, *whole, "-r", str(pins)], folder / f"{name}.log")
        done.write_text(mark)
    return pythons


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("ab") as out:
        code = subprocess.run(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        raise InputError(f"{' '.join(command[:4])} … failed: {lines[-1]} (all of it: {log})")


def _python312(given: Path | None) -> Path | None:
    """An interpreter of at least 3.12: the given one, ours, or one on PATH that really runs.

    Raises InputError if the given one is older or does not run.
    """
    if given is not None:
        if not _is_312(given):
            raise InputError(f"--python312 {given}: this is no Python 3.12 or newer")
        return given.absolute()
    found = (shutil.which(f"python3.{minor}") for minor in (12, 13, 14))
    candidates = [Path(sys.executable), *(Path(path) for path in found if path)]
    return next((python for python in candidates if _is_312(python)), None)


def _is_312(python: Path) -> bool:
    """Whether it runs and is new enough; a version manager's stand-in may do neither."""
    ask = "import sys; sys.exit(sys.version_info < (3, 12))"
    try:
        return subprocess.run([str(python), "-c", ask], capture_output=True).returncode == 0
    except OSError:
        return False
