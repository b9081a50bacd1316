"""What a sandbox container is made from: a root file system of this machine's own parts, or an
image that the user names, with the runner and pytest put into it.

The first needs no registry: the interpreter with its standard library, a few dozen command line
tools, and the shared libraries that those want, at the paths where they lie here. Its hash is that
of all contents, compiled files left out, and names it.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from configs.errors import InputError
from sandbox.isolation import HOME_INSIDE, inside, interpreter, library

# users that a container may be run as; one each, for limits count by user
FIRST_UID, UIDS = 61_184, 1000

TOOLS = (
    "sh bash ls cat cp mv rm mkdir rmdir ln touch chmod head tail wc sort uniq cut tr sed grep "
    "egrep awk find xargs diff patch tar gzip stat env printf echo true false sleep seq yes date "
    "dirname basename readlink realpath tee test expr id uname du df mktemp mkfifo truncate "
    "setsid timeout nproc kill ps git cmp od md5sum sha256sum comm paste fold nl tac"
).split()
# of the standard library: other software, its own tests, and what wants a display
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo"}
_LEFT_OUT |= {"ensurepip", "lib2to3", "config"}


class RootFS:
    """Entries of a root file system by path: a link's target, a file's source, or a folder."""

    def __init__(self) -> None:
        self.links: dict[str, str] = {}
        self.files: dict[str, Path | bytes] = {}
        self.folders: dict[str, int] = {}

    def add(self, path: str) -> None:
        """A file or link of this machine, with every link and folder on the way to it."""
        here = ""
        names = [name for name in path.split("/") if name]
        for index, name in enumerate(names):
            here = f"{here}/{name}"
            if os.path.islink(here):
                target = os.readlink(here)
                self.links[here] = target
                there = os.path.normpath(os.path.join(os.path.dirname(here), target))
                self.add("/".join([there, *names[index + 1 :]]))
                return
            if index < len(names) - 1:
                self.folders.setdefault(here, 0o755)
        if os.path.isfile(here):
            self.files[here] = Path(here)

    def put(self, path: str, source: Path | bytes) -> None:
        """A file with these contents, in folders made for it."""
        self.files[path] = source
        for parent in list(Path(path).parents)[:-1]:
            self.folders.setdefault(str(parent), 0o755)

    def digest(self) -> str:
        """SHA-256 over all paths, modes and contents, in hexadecimal."""
        total = hashlib.sha256()
        for path in sorted({**self.links, **self.files, **self.folders}):
            if path.endswith(".pyc"):
                continue
            if path in self.links:
                what = f"link {self.links[path]}"
            elif path in self.files:
                source = self.files[path]
                what = f"{_mode(source):o} {hashlib.sha256(_data(source)).hexdigest()}"
            else:
                what = f"folder {self.folders[path]:o}"
            total.update(f"{path}\0{what}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def write(self, file: BinaryIO) -> None:
        """The whole as a tar, owned by root."""
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path in sorted({**self.links, **self.files, **self.folders}):
                info = tarfile.TarInfo(path.lstrip("/"))
                data = b""
                if path in self.links:
                    info.type, info.linkname = tarfile.SYMTYPE, self.links[path]
                elif path in self.files:
                    source = self.files[path]
                    data, info.mode = _data(source), _mode(source)
                    if isinstance(source, Path):
                        info.mtime = int(source.stat().st_mtime)  # compiled files go by it
                else:
                    info.type, info.mode = tarfile.DIRTYPE, self.folders[path]
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@cache
def machine_rootfs() -> RootFS:
    """The root file system made of this machine's parts."""
    root = RootFS()
    programs = [interpreter(), *filter(None, map(shutil.which, TOOLS))]
    programs += ["/bin/sh", "/bin/bash", "/usr/bin/env"]  # as scripts name them
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        for path in _modules(os.path.realpath(folder)):
            root.add(path)
            if path.endswith(".so"):
                programs.append(path)
    for path in programs:
        root.add(path)
    for path in _libraries(programs):
        root.add(path)
    for path in ("/usr/share/zoneinfo/UTC", "/usr/lib/locale/C.utf8"):
        if os.path.isfile(path):
            root.add(path)
    for name in ("python3", f"python3.{sys.version_info.minor}"):
        root.links[f"/usr/local/bin/{name}"] = interpreter()
    root.folders |= {"/usr/local": 0o755, "/usr/local/bin": 0o755}
    users = range(FIRST_UID, FIRST_UID + UIDS)
    texts = {
        "passwd": "root:x:0:0:root:/:/bin/sh\n"
        + "".join(f"sandbox:x:{uid}:{uid}::/tmp/home:/bin/sh\n" for uid in users),
        "group": "root:x:0:\n" + "".join(f"sandbox:x:{uid}:\n" for uid in users),
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }
    for name, text in texts.items():
        root.put(f"/etc/{name}", text.encode())
    for path in ("/proc", "/sys", "/dev", "/work", "/tmp", "/etc", "/root"):
        root.folders[path] = 0o755
    add_runner(root)
    return root


def add_runner(root: RootFS) -> None:
    """The runner's parts, and the packages that pytest is made of."""
    for source, name in (*inside(), *library()):
        if source.is_file():
            root.put(f"{HOME_INSIDE}/{name}", source)
            continue
        for path in sorted(source.rglob("*")):
            if path.is_file():
                root.put(f"{HOME_INSIDE}/{name}/{path.relative_to(source)}", path)


def context(base: str) -> BinaryIO:
    """A build context that puts the runner into the image `base`, as a tar."""
    root = RootFS()
    add_runner(root)
    dockerfile = f"FROM {base}\nUSER root\nCOPY .{HOME_INSIDE} {HOME_INSIDE}\n"
    root.put("/Dockerfile", dockerfile.encode())
    file = io.BytesIO()
    root.write(file)
    file.seek(0)
    return file


def _modules(folder: str) -> Iterator[str]:
    for path, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if n not in _LEFT_OUT and not n.startswith("config-")]
        yield from (f"{path}/{name}" for name in names if not name.endswith((".a", ".exe")))


def _libraries(programs: list[str]) -> set[str]:
    """Shared libraries that programs of this machine want, as `ldd` finds them."""
    if shutil.which("ldd") is None:
        raise InputError("ldd is not installed: name an image with python3 as sandbox.image")
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True)
    found = set()
    for line in done.stdout.splitlines():
        words = line.split()
        if line[:1].isspace() and words:
            path = words[2] if len(words) > 2 and words[1] == "=>" else words[0]
            if path.startswith("/"):
                found.add(path)
    return found


def _data(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _mode(source: Path | bytes) -> int:
    if isinstance(source, bytes):
        return 0o644
    return 0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644
