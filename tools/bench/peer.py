"""The peers: which script measures each, which interpreter runs it, and the process that does."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError

OURS = "remend"
REFERENCE = "transformers"  # the others' numbers are compared with its, or with ours without it
SCRIPTS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[2]
PEERS = (OURS, REFERENCE, "plain-jax", "tunix", "maxtext", "easydel")
TIMEOUT_S = 1800.0  # for one answer, a first call's compilation included


def script_of(name: str) -> Path:
    """The script that measures a peer."""
    return SCRIPTS / f"with_{name.replace('-', '_')}.py"


def default_pythons() -> dict[str, Path]:
    """Peers that the running interpreter can measure, without an environment of their own."""
    here = Path(sys.executable)
    pythons = {OURS: here, "plain-jax": here}
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pythons[REFERENCE] = here
    return pythons


def parse_peer(text: str) -> tuple[str, Path]:
    """(name, interpreter) from NAME=PATH. Raises InputError for a name or a file there is not."""
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise InputError(f"--peer {text}: expected NAME=PYTHON, NAME one of {', '.join(PEERS)}")
    python = Path(path).expanduser()
    if not os.access(python, os.X_OK) or python.is_dir():
        raise InputError(f"--peer {text}: {python} is not an executable file")
    return name, python.absolute()  # not resolved: a venv's python is known by its own path


class PeerFailed(Exception):
    """A peer could not be measured; the message is one line that says why."""


@dataclass(frozen=True)
class Call:
    """One call of a worker. peak_mib: largest resident memory of its process so far.

    result: what the call computed, as nested lists or a number.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    result: Any


class Worker:
    """A process that measures one thing with one peer; idle but for the length of `call`.

    Args:
        job: fields of `peers/worker.py`'s Job, without `answers`.
        cores: the only cores it may run on.
        log: file for what it prints.
    """

    def __init__(
        self, name: str, python: Path, job: dict[str, Any], cores: Sequence[int], log: Path
    ) -> None:
        self.name, self._log = name, log
        self._answers, theirs = os.pipe()
        self._buffer = b""
        command = [str(python), str(script_of(name)), json.dumps(job | {"answers": theirs})]
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, cores)  # which the child inherits before it has any thread
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    pass_fds=(theirs,),
                    env=_environment(name, len(cores), job["device"]),
                )
        except OSError as error:
            os.close(self._answers)
            raise PeerFailed(f"{python} does not run: {error.strerror}") from None
        finally:
            os.sched_setaffinity(0, before)
            os.close(theirs)

    def ready(self) -> dict[str, str]:
        """Wait until it has loaded the checkpoint; the versions of its packages."""
        return self._answer()["versions"]

    def call(self) -> Call:
        """Do the work once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._ending()) from None
        return Call(**self._answer())

    def close(self) -> None:
        """End the process. May be called twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
            os.close(self._answers)

    def _answer(self) -> Any:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], left)[0]:
                raise PeerFailed(f"no answer within {TIMEOUT_S:.0f} s")
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise PeerFailed(self._ending())
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _ending(self) -> str:
        """Why the process has ended: the last line that it printed, and its exit code."""
        try:
            code = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # some library's thread holds up the interpreter's end
            self._process.kill()
            code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it ended"]
        return f"{lines[-1].strip()} (exit code {code})"


def _environment(name: str, threads: int, device: str) -> dict[str, str]:
    """The environment of a worker: as many threads as cores, and nothing of ours on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    pools = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    environment |= {f"{pool}_NUM_THREADS": str(threads) for pool in pools}
    # OpenMP's threads wait asleep: where anything else runs on the cores, spinning ones wait for
    # each other's turns, and torch then takes up to twenty times as long
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # workers share the device
        environment.pop("JAX_PLATFORMS", None)
    if name == OURS:
        environment["PYTHONPATH"] = str(ROOT)
    return environment
