"""How a runner is put apart from the machine: by bubblewrap, or, where that is refused, plainly.

`bwrap`: own user (or a spare one, when we are root), processes, network, IPC and file system, the
last holding nothing but system programs, the interpreter and pytest, all read-only, the workspace
and two small temporary folders. `plain`: the same runner on the machine itself, with what a process
can do to itself: resource limits, no new privileges, a filter of system calls, a spare user or
namespaces where the kernel grants them. It does not hide the machine's files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from configs.errors import InputError
from sandbox.base import Limits
from sandbox.confine import CAP_DAC_READ_SEARCH
from sandbox.software import other_software

# what runs inside, and what of the installed packages it may see
_INSIDE = ("runner.py", "confine.py", "testrun.py", "courier.py", "treefiles.py")
_LIBRARY = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
HOME_INSIDE = "/run/remend"

# Only what is put on the path is there: no script's folder, no user's or installed packages. Not
# isolated mode, which would leave out the environment too, and with it the fixed hash seed.
FLAGS = ("-P", "-s", "-S")

# Users that no machine's accounts, containers or services are given (systemd's UIDs and GIDs).
_FIRST_SPARE_UID, _SPARE_UIDS = 1_900_000_000, 200_000_000
_FIRST_SPARE_UID_16, _SPARE_UIDS_16 = 61_184, 4_000

_slots = itertools.count()


@dataclass(frozen=True)
class Launch:
    """How to start one runner.

    Attributes:
      argv: the command; its standard input is to be the channel.
      files: contents to be handed down, by descriptor number as `argv` names it by `{name}`.
      setup: the first message of the protocol.
    """

    argv: tuple[str, ...]
    files: dict[str, bytes]
    environment: dict[str, str]
    setup: dict[str, Any]


def interpreter() -> str:
    """The real program behind this Python: not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def spare_uid() -> int | None:
    """A user id for a new slot, or None if we are not root and so must stay ourselves.

    Different for every slot of the machine as far as may be, since limits count by user.
    """
    if os.geteuid() != 0:
        return None
    first, count = _FIRST_SPARE_UID, _SPARE_UIDS
    if not _mapped(first + count):
        first, count = _FIRST_SPARE_UID_16, _SPARE_UIDS_16
    if not _mapped(first + count):
        return None
    return first + (os.getpid() * 64 + next(_slots)) % count


def _mapped(uid: int) -> bool:
    """Whether this user namespace has such a user."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    return any(inside <= uid < inside + count for inside, _, count in ranges)


def plain_user() -> tuple[int | None, bool]:
    """`spare_uid` where it could run our interpreter, and whether that takes the right to read all.

    A root that keeps its Python to itself lends that right (CAP_DAC_READ_SEARCH) to the spare user:
    as root itself, without any capability, a child could write every file of root's, and the kernel
    would not hold it to a number of processes (RLIMIT_NPROC spares user 0).
    """
    uid, program = spare_uid(), Path(interpreter())
    if uid is None or program.stat().st_mode & 0o005 != 0o005:
        return None, False
    if all(folder.stat().st_mode & 0o001 for folder in program.parents):
        return uid, False
    with open("/proc/self/status") as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith("CapPrm:"))
    return (uid, True) if held >> CAP_DAC_READ_SEARCH & 1 else (None, False)


def launch(
    backend: str,
    folder: Path,
    uid: int | None,
    limits: Limits,
    reads_all: bool = False,
    shell: bool = False,
) -> Launch:
    """The command and setup of the runner whose folder (with `work` in it) is `folder`.

    `reads_all`: see `plain_user`. `shell`: an agent will have one inside; `bwrap` then covers
    other software (`sandbox.software`).

    Raises InputError if `bwrap` is asked for and not installed, or pytest is not.
    """
    if backend == "bwrap":
        return _bwrap(folder, uid, limits, other_software() if shell else ())
    return _plain(folder, uid, limits, reads_all)


def _bwrap(folder: Path, uid: int | None, limits: Limits, covered: Sequence[str]) -> Launch:
    program = shutil.which("bwrap")
    if program is None:
        raise InputError("bwrap is not installed: install bubblewrap, or use the plain backend")
    user = os.getuid() if uid is None else uid
    files = {
        "passwd": f"sandbox:x:{user}:{user}::/tmp/home:/bin/sh\n".encode(),
        "group": f"sandbox:x:{user}:\n".encode(),
        "hosts": b"127.0.0.1 localhost sandbox\n::1 localhost\n",
    }
    apart = ("ipc", "pid", "net", "uts")
    argv = [program, "--die-with-parent", "--new-session", "--as-pid-1"]
    argv += [f"--unshare-{name}" for name in apart]
    argv += ["--unshare-cgroup-try", "--hostname", "sandbox"]
    if uid is None:
        argv += ["--unshare-user", "--uid", str(user), "--gid", str(os.getgid())]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    argv += ["--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/dev/shm"]
    argv += ["--remount-ro", "/dev"]
    argv += ["--perms", "1777", "--size", str(limits.memory_mib << 19), "--tmpfs", "/tmp"]
    # folders that bwrap makes on the way to a target would be root's alone
    for path in _parents([*(path for path, _ in _system_folders()), "/etc/x", f"{HOME_INSIDE}/x"]):
        argv += ["--dir", path]
    for path, target in _system_folders():
        argv += ["--symlink", target, path] if target else ["--ro-bind", path, path]
    for path in (*_site_packages(), *covered):
        argv += ["--tmpfs", path]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        argv += ["--ro-bind-try", path, path]
    for name in files:
        argv += ["--ro-bind-data", f"{{{name}}}", f"/etc/{name}"]
    for source, name in (*inside(), *library()):
        argv += ["--ro-bind", str(source), f"{HOME_INSIDE}/{name}"]
    argv += ["--bind", str(folder / "work"), "/work", "--remount-ro", "/", "--chdir", "/work", "--"]
    argv += [interpreter(), *FLAGS, f"{HOME_INSIDE}/runner.py"]
    environment = environment_inside("/tmp/home", "/tmp", HOME_INSIDE)
    setup = runner_setup(limits, uid, environment) | {
        "workspace": "/work",
        "temporary": ["/tmp", "/dev/shm"],
        "library": HOME_INSIDE,
        "enter_namespaces": False,
        "reads_all": False,
        "own_network": True,
    }
    return Launch(tuple(argv), files, environment, setup)


def _plain(folder: Path, uid: int | None, limits: Limits, reads_all: bool) -> Launch:
    beside = folder / "inside"
    if not beside.exists():
        beside.mkdir(mode=0o755)
        for source, name in (*inside(), *library()):
            (beside / name).symlink_to(source)
    temporary = folder / "tmp"
    temporary.mkdir(mode=0o700, exist_ok=True)
    if uid is not None:
        os.chown(temporary, uid, uid)
    environment = environment_inside(f"{temporary}/home", str(temporary), str(beside))
    setup = runner_setup(limits, uid, environment) | {
        "workspace": str(folder / "work"),
        "temporary": [str(temporary)],
        "library": str(beside),
        "enter_namespaces": True,
        "reads_all": reads_all,
        "own_network": False,
    }
    argv = (interpreter(), *FLAGS, str(beside / "runner.py"))
    return Launch(argv, {}, environment, setup)


def runner_setup(limits: Limits, uid: int | None, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "environment": environment,
        "uid": uid,
        "gid": uid,
        "limits": {
            "memory_mib": limits.memory_mib,
            "processes": limits.processes,
            "output_bytes": limits.output_bytes,
            "file_mib": limits.file_mib,
        },
    }


def environment_inside(home: str, temporary: str, library: str) -> dict[str, str]:
    """The whole environment inside: nothing of ours."""
    return {
        "HOME": home,
        "LANG": "C.UTF-8",
        "LOGNAME": "sandbox",
        # nothing is installed or upgraded from inside: there is no index to ask
        "PIP_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "PATH": f"{Path(interpreter()).parent}:/usr/local/bin:/usr/bin:/bin",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": library,
        "TMPDIR": temporary,
        "TZ": "UTC",
        "USER": "sandbox",
    }


def _system_folders() -> list[tuple[str, str]]:
    """Folders that programs need, and for those that are links, where they point."""
    found = []
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(path):
            found.append((path, os.readlink(path)))
        elif os.path.isdir(path):
            found.append((path, ""))
    for prefix in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix)):
        if not Path(prefix).resolve().is_relative_to("/usr"):
            found.append((str(Path(prefix).resolve()), ""))
    return found


def _site_packages() -> list[str]:
    """Folders of packages installed beside the interpreter: not there for what runs inside."""
    paths = [*site.getsitepackages([sys.base_prefix]), "/usr/lib/python3/dist-packages"]
    return [path for path in dict.fromkeys(map(os.path.realpath, paths)) if os.path.isdir(path)]


def _parents(paths: Iterable[str]) -> list[str]:
    """Every folder that leads to one of `paths`, outermost first."""
    return sorted({str(parent) for path in paths for parent in Path(path).parents if parent.name})


@cache
def environment_hash() -> str:
    """SHA-256 of the interpreter, of its standard library's names and sizes, and of what is put
    beside them: what a sandbox of this machine finds installed."""
    total = hashlib.sha256(sys.version.encode())
    total.update(Path(interpreter()).read_bytes())
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(p for p in folder.rglob("*.py") if "-packages" not in str(p))
    for path in modules:
        total.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\n".encode())
    for source, name in (*inside(), *library()):
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            total.update(f"{name}/{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def inside() -> list[tuple[Path, str]]:
    """The files that the runner is made of, and their names where it runs."""
    here = Path(__file__).resolve().parent
    return [(here / name, name) for name in _INSIDE]


def library() -> list[tuple[Path, str]]:
    """The packages that pytest is made of, and their names beside the runner."""
    found = []
    for name in _LIBRARY:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InputError(f"{name} is not installed: pip install pytest")
        origin = Path(spec.origin).resolve()
        package = origin.parent if origin.name == "__init__.py" else origin
        found.append((package, package.name))
    return found
