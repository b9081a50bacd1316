"""Other projects' Docker environments beside our pool: same engine, same image, same episode."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import InputError
from sandbox.base import Limits
from sandbox.docker import ContainerConfig, DockerHost, Engine
from sandbox.image import interpreter
from sandbox.isolation import HOME_INSIDE

PEERS = ("mini-swe-agent", "swe-rex")
SCRIPT = Path(__file__).with_name("peer_episodes.py")
TIMEOUT_S = 900.0


def parse_peer(text: str) -> tuple[str, Path]:
    """(name, interpreter) from NAME=PYTHON. Raises InputError for a name or a file there is not."""
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise InputError(f"--peer {text}: expected NAME=PYTHON, NAME one of {', '.join(PEERS)}")
    python = Path(path).expanduser().absolute()  # not resolved: a venv is known by its own path
    if not os.access(python, os.X_OK) or python.is_dir():
        raise InputError(f"--peer {text}: {python} is not an executable file")
    return name, python


def measure_peer(
    name: str,
    python: Path,
    engine: Engine,
    files: Mapping[str, bytes],
    fix: tuple[str, bytes],
    tests: Sequence[str],
    rounds: int,
    slots: int,
) -> dict[str, float | str]:
    """`version`, `fresh ms`, `exec ms` and `episodes/s` of a peer on a connected engine.

    `files` are in its image from the start, in /repo; the episode writes `fix` (path, contents).

    Raises InputError, with what it last said, if the peer does not get through.
    """
    image = engine.build(context(engine.base, files))
    environment = f"PYTHONPATH={HOME_INSIDE} PYTHONDONTWRITEBYTECODE=1"
    job = {
        "peer": name,
        "image": image,
        "rounds": rounds,
        "slots": slots,
        "test": f"cd /repo && {environment} {interpreter()} -m pytest -q -p no:cacheprovider "
        + shlex.join(tests),
        "fix": f"printf %s {shlex.quote(fix[1].decode())} > /repo/{fix[0]}",
    }
    try:
        done = subprocess.run(
            [str(python), str(SCRIPT), json.dumps(job)],
            env={**_clean(os.environ), "DOCKER_HOST": engine.host.address},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{name}: not done within {TIMEOUT_S:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
        raise InputError(f"{name}: {said[-1][:300]}")
    found: dict[str, float | str] = json.loads(lines[-1])
    return found


def context(base: str, files: Mapping[str, bytes]) -> io.BytesIO:
    """A build context that puts `files` into /repo and /pristine of the image `base`."""
    made = io.BytesIO()
    dockerfile = f"FROM {base}\nCOPY repo /repo\nCOPY repo /pristine\n"
    with tarfile.open(fileobj=made, mode="w") as archive:
        inside = {f"repo/{path}": data for path, data in files.items()}
        for path, data in {"Dockerfile": dockerfile.encode(), **inside}.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    made.seek(0)
    return made


def engine_for(host: DockerHost, limits: Limits) -> Engine:
    """A connected engine with our image."""
    engine = Engine(host, limits, ContainerConfig(), "bench-peers")
    engine.connect()
    return engine


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
