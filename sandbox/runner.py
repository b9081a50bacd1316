"""The process inside a sandbox: takes requests, forks a child for each, and outlives them all.

Started as `python -P -s -S runner.py`, with the standard library and pytest at hand and nothing
else. It imports pytest once; a test run is then a fork away. Untrusted code runs in the children
only, which hold no way to the harness and cannot trace or signal this process.

Messages over the socket that is descriptor 0, both ways, or over descriptors 0 and 1 if those are
pipes (a container's), are a 4-byte big-endian length and JSON. The first one configures; each later
`{"op": "exec" | "test" | "prebuild" | "wipe", …}` has one answer, as have those about files (see
`courier`). End of input ends the runner and, as process 1 of its namespace, everything else.
"""

from __future__ import annotations

import base64
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # -P leaves it out

import confine  # noqa: E402

TICK_S = 0.1  # how often memory and processes are looked at
ROOT_TICK_S = 0.01  # where nobody else limits processes: the kernel lets user 0 make any number
MAX_REPORT_BYTES = 8 << 20
MAX_TEST_OUTPUT = 1 << 20
TAIL_BYTES = 8000
INODE_BYTES = 1024  # what an empty file costs a tmpfs
PAGE_BYTES = resource.getpagesize()

# standard modules not to be imported ahead of a test that wants them: they act on import, or warn
_NOT_AHEAD = frozenset(
    "__main__ antigravity this idlelib turtle turtledemo tkinter test lib2to3 ensurepip venv site "
    "sitecustomize usercustomize readline rlcompleter curses imp distutils asynchat asyncore smtpd "
    "pty tty nis crypt spwd audioop cgi cgitb chunk imghdr mailcap msilib nntplib ossaudiodev "
    "pipes sndhdr sunau telnetlib uu xdrlib".split()
)


class Pipe:
    """One output of a child; `data` keeps the first, or with `tail` the last, `keep` bytes."""

    def __init__(self, keep: int, tail: bool = False) -> None:
        self.fd, self.child_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.fd, False)
        self.data = bytearray()
        self.seen = 0
        self._keep, self._tail = keep, tail

    def read(self) -> bool:
        """Take what is there, at most 64 KiB; False if nothing came."""
        try:
            chunk = os.read(self.fd, 65536)
        except BlockingIOError:
            return False
        self.seen += len(chunk)
        self.data += chunk
        if len(self.data) > self._keep:
            if self._tail:
                del self.data[: -self._keep]
            else:
                del self.data[self._keep :]
        return bool(chunk)

    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat, as far as it is wanted."""

    pid: int
    parent: int
    threads: int
    resident: int  # bytes


def processes() -> list[Process]:
    """All processes below this one. With a /proc of our own that is all it shows."""
    own = int(os.readlink("/proc/self"))
    table: dict[int, Process] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] != b"Z":
                resident = int(fields[21]) * PAGE_BYTES
                table[int(name)] = Process(int(name), int(fields[1]), int(fields[17]), resident)
    if own == 1:
        return [process for pid, process in table.items() if pid != 1]
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found = list(children.get(own, ()))
    for process in found:  # grows as it is walked
        found += children.get(process.pid, ())
    return found


def proportional(pid: int) -> int:
    """Memory of a process in bytes, pages shared with others counted in proportion."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
    except ProcessLookupError:
        return 0
    raise OSError(f"no Pss for {pid}")


def disk_used(folder: str) -> int:
    """Bytes that a folder takes up on a tmpfs, or anywhere."""
    total = 0
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            total += INODE_BYTES + os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


class Runner:
    """Serves one harness over a connected socket."""

    def __init__(
        self,
        channel: int,
        answers: int,
        setup: Mapping[str, Any],
        facts: Mapping[str, Any],
        shares_user: bool,
    ) -> None:
        self._channel, self._answers = channel, answers
        self._facts = facts
        self._workspace: str = setup["workspace"]
        self._temporary: list[str] = setup["temporary"]
        self._environment: dict[str, str] = setup["environment"]
        limits = setup["limits"]
        self._memory: int = limits["memory_mib"] << 20
        self._file: int = limits["file_mib"] << 20
        self._processes: int = limits["processes"]
        self._output: int = limits["output_bytes"]
        # without a process namespace the user's other processes count against RLIMIT_NPROC
        self._shares_user = shares_user

    def serve(self) -> None:
        """Answer requests until there are no more. Also raises, in a child that is to run tests."""
        settle()
        self._wipe()
        send(self._answers, self._facts)
        courier: Any = None  # there for those who have the workspace in their own hands
        while (request := receive(self._channel)) is not None:
            ahead: list[str] = []
            if request["op"] == "wipe":
                self._wipe()
                answer: dict[str, Any] = {}
            elif request["op"] == "exec":
                answer = self._exec(request)
            elif request["op"] in ("test", "prebuild"):
                answer, ahead = self._test(request)
            else:
                if courier is None:
                    courier = importlib.import_module("courier").Courier(self._workspace)
                answer = courier.answer(request, self._channel)
            send(self._answers, answer)
            self._import_ahead(ahead)

    def _exec(self, request: Mapping[str, Any]) -> dict[str, Any]:
        argv: list[str] = request["argv"]
        stdin = os.memfd_create("stdin")
        with os.fdopen(stdin, "wb", closefd=False) as file:
            file.write(base64.b64decode(request["stdin"]))
        os.lseek(stdin, 0, os.SEEK_SET)
        out, err = Pipe(self._output), Pipe(self._output)

        def child() -> NoReturn:
            adopt(stdin, out.child_fd, err.child_fd)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python; would be inherited
                signal.signal(ignored, signal.SIG_DFL)
            try:
                os.execvpe(argv[0], argv, self._variables(request["python_path"]))
            except (OSError, UnicodeError) as error:
                os.write(2, f"{error}\n".encode(errors="replace"))
                os._exit(127 if isinstance(error, FileNotFoundError) else 126)

        def overflows() -> bool:
            return out.seen + err.seen > self._output

        try:
            end = self._supervise(child, (out, err), overflows, request["wall_s"])
        finally:
            os.close(stdin)
        del err.data[max(0, self._output - len(out.data)) :]
        last_line = err.text().rstrip().rpartition("\n")[2]
        if end["killed_by"] is None and end["exit_code"] and last_line.startswith("MemoryError"):
            end["killed_by"] = "memory"
        return {**end, "stdout": out.text(), "stderr": err.text()}

    def _test(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Run or prebuild tests in a forked child: the answer, and modules to import ahead."""
        import testrun

        report, output = Pipe(MAX_REPORT_BYTES), Pipe(TAIL_BYTES, tail=True)

        def child() -> NoReturn:
            adopt(os.open(os.devnull, os.O_RDONLY), output.child_fd, output.child_fd)
            os.environ.update(self._variables(request["python_path"]))
            sys.path[:0] = self._paths(request["python_path"])
            sys.argv[:] = ["pytest"]
            prebuild = request["op"] == "prebuild"
            raise testrun.Begin(
                request["ids"], report.child_fd, prebuild, request.get("shuffled", False)
            )

        def overflows() -> bool:
            return report.seen > MAX_REPORT_BYTES or output.seen > MAX_TEST_OUTPUT

        self._wipe()
        cpu_s = request.get("cpu_s")
        end = self._supervise(child, (report, output), overflows, request["wall_s"], cpu_s)
        self._wipe()
        lines = report.text().splitlines()
        ahead: list[str] = []
        if lines and lines[-1].startswith('{"ahead"'):
            ahead = read_ahead(lines.pop())
        return {**end, "lines": lines, "tail": output.text()}, ahead

    def _variables(self, python_path: Sequence[str]) -> dict[str, str]:
        paths = [*self._paths(python_path), self._environment["PYTHONPATH"]]
        return {**self._environment, "PYTHONPATH": os.pathsep.join(paths)}

    def _paths(self, python_path: Sequence[str]) -> list[str]:
        return [os.path.normpath(f"{self._workspace}/{path}") for path in python_path]

    def _import_ahead(self, names: Sequence[str]) -> None:
        """Import standard modules that the last tests wanted, so that the next ones find them."""
        for name in names:
            try:
                importlib.import_module(name)
            except Exception:
                continue  # it will fail the same way in the test
        if names:
            settle()

    def _wipe(self) -> None:
        """Empty the temporary folders. What cannot be removed ends the runner: a fresh one."""
        for folder in self._temporary:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)
        os.makedirs(self._environment["HOME"], exist_ok=True)

    # -- supervision

    def _supervise(
        self,
        child: Callable[[], NoReturn],
        pipes: Sequence[Pipe],
        overflows: Callable[[], bool],
        wall_s: float,
        cpu_s: float | None = None,
    ) -> dict[str, Any]:
        """Fork `child`, read `pipes` until it ends or breaks a limit, then kill what is left.

        `cpu_s`: CPU time after which the kernel ends the child, by SIGPROF."""
        began = time.monotonic()
        every = TICK_S if os.getuid() else ROOT_TICK_S
        deadline, tick = began + wall_s, began + every
        disk_before = self._disk_free()
        processes_limit = self._processes_limit()
        pid = os.fork()
        if pid == 0:
            self._enter_child(wall_s, processes_limit)
            if cpu_s is not None:
                signal.setitimer(signal.ITIMER_PROF, cpu_s)
            child()
        for pipe in pipes:
            os.close(pipe.child_fd)
        ended = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._channel, select.POLLRDHUP)
        readers = {pipe.fd: pipe for pipe in pipes}
        for fd in readers:
            poll.register(fd, select.POLLIN)
        running, killed_by = True, None
        while running and killed_by is None:
            for fd, _ in poll.poll(max(0.0, min(tick, deadline) - time.monotonic()) * 1000):
                if fd == ended:
                    running = False
                elif fd == self._channel:  # the harness has gone
                    kill_all()
                    os._exit(0)
                elif not readers[fd].read():
                    poll.unregister(fd)
            now = time.monotonic()
            if overflows():
                killed_by = "output"
            elif running and now >= deadline:
                killed_by = "deadline"
            elif running and now >= tick:
                killed_by = self._over_limit(disk_before)
                tick = time.monotonic() + every
        os.close(ended)
        status, peak, used_s = clear(pid, running)
        for pipe in pipes:
            while pipe.read() and not overflows():
                pass
            os.close(pipe.fd)
        code = os.waitstatus_to_exitcode(status)
        if killed_by is None and overflows():
            killed_by = "output"
        if killed_by is None and code and peak > 0.9 * self._memory:
            killed_by = "memory"
        if killed_by is None and code:  # it may have been quicker than our look
            killed_by = self._over_limit(disk_before)
        seconds = time.monotonic() - began
        return {"exit_code": code, "killed_by": killed_by, "seconds": seconds, "cpu_s": used_s}

    def _enter_child(self, wall_s: float, processes_limit: int) -> None:
        for fd in {self._channel, self._answers}:
            os.close(fd)
        os.setsid()
        confine.expose()
        for kind, value in (
            (resource.RLIMIT_AS, self._memory),
            (resource.RLIMIT_NPROC, processes_limit),
            (resource.RLIMIT_FSIZE, self._file),
            (resource.RLIMIT_CPU, math.ceil(wall_s) + 1),
            (resource.RLIMIT_NOFILE, 1024),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))
        os.chdir(self._workspace)

    def _processes_limit(self) -> int:
        if not self._shares_user:
            return self._processes + 1  # and this process
        uid, count = os.getuid(), 0
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if os.stat(f"/proc/{name}").st_uid == uid:
                        count += len(os.listdir(f"/proc/{name}/task"))
                except OSError:
                    continue
        return self._processes + count

    def _disk_free(self) -> int:
        """Free space where children can write, in bytes, files themselves counted."""
        free = {}
        for path in (self._workspace, *self._temporary):
            room = os.statvfs(path)
            free[os.stat(path).st_dev] = room.f_bfree * room.f_frsize + room.f_ffree * INODE_BYTES
        return sum(free.values())

    def _over_limit(self, disk_before: int) -> str | None:
        """Which limit the children break together: first a cheap look, then a true one."""
        below = processes()
        if sum(process.threads for process in below) >= self._processes:
            return "processes"
        written = max(0, disk_before - self._disk_free())
        if sum(process.resident for process in below) + written <= self._memory:
            return None
        try:
            used = sum(proportional(process.pid) for process in below)
            used += sum(disk_used(path) for path in (self._workspace, *self._temporary))
        except (OSError, RecursionError):
            return "memory"  # hidden from us on purpose
        return "memory" if used > self._memory else None


def kill_all() -> None:
    """Kill every process but this one; where there is no namespace, all below this one."""
    if os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return
    stopped: set[int] = set()
    while fresh := [process.pid for process in processes() if process.pid not in stopped]:
        for pid in fresh:  # a stopped process makes no new ones
            signal_one(pid, signal.SIGSTOP)
            stopped.add(pid)
    for pid in stopped:
        signal_one(pid, signal.SIGKILL)


def signal_one(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def clear(pid: int, running: bool) -> tuple[int, int, float]:
    """Kill whatever there is, the child `pid` too if it is still `running`, and wait for it all.

    Returns the wait status of `pid`, the largest memory of any child, in bytes, and the CPU time
    of them all, in seconds.
    """
    status, peak, used_s = 0, 0, 0.0
    if not running:
        _, status, usage = os.wait4(pid, 0)
        peak, used_s = usage.ru_maxrss << 10, usage.ru_utime + usage.ru_stime
        if not has_children():
            return status, peak, used_s  # it left nothing behind, as most do
    kill_all()
    while True:
        try:
            ended, ended_status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return status, peak, used_s
        if ended:
            peak = max(peak, usage.ru_maxrss << 10)
            used_s += usage.ru_utime + usage.ru_stime
            if ended == pid:
                status = ended_status
        else:
            # the list of processes is no snapshot: one may have slipped from parent to parent
            time.sleep(0.002)
            kill_all()


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def adopt(*fds: int) -> None:
    """Make these descriptors 0, 1 and 2."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)


def is_standard(name: str) -> bool:
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names and top not in _NOT_AHEAD


def read_ahead(line: str) -> list[str]:
    """The names in a line written by untrusted code: strings, and standard modules, or nothing."""
    try:
        names = json.loads(line)["ahead"]
        return [n for n in names if isinstance(n, str) and is_standard(n) and n not in sys.modules]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def settle() -> None:
    """Take what is loaded out of the garbage collector's sight: children leave its pages shared."""
    gc.collect()
    gc.freeze()


def receive(channel: int) -> dict[str, Any] | None:
    """The next message, or None at the end of input."""
    head = _exactly(channel, 4)
    body = head and _exactly(channel, struct.unpack(">I", head)[0])
    return json.loads(body) if body else None


def _exactly(channel: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        chunk = os.read(channel, count - len(parts))
        if not chunk:
            return b""
        parts += chunk
    return bytes(parts)


def send(channel: int, message: Mapping[str, Any]) -> None:
    body = json.dumps(message).encode()
    data = memoryview(struct.pack(">I", len(body)) + body)
    while data:
        data = data[os.write(channel, data) :]


def main() -> None:
    """Confine this process as the first message asks, load pytest, and serve."""
    channel = answers = os.dup(0)
    os.set_inheritable(channel, False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    contained = not stat.S_ISSOCK(os.fstat(channel).st_mode)
    if contained:
        answers = os.dup(1)
        os.set_inheritable(answers, False)
        os.dup2(2, 1)
    setup = receive(channel)
    if setup is None:
        return
    sys.dont_write_bytecode = True
    sys.path.append(setup["library"])
    facts: dict[str, Any] = {"namespaces": False}
    if setup["enter_namespaces"]:
        facts["namespaces"] = confine.enter_namespaces(channel)
    confine.first_to_be_killed()
    own_processes = os.getpid() == 1
    # process 1 takes its whole namespace along; without one, `kill_all` needs us to outlive others
    # a container's process 1 has a parent that is not ours, and ends with its input
    mortal = own_processes and not contained
    confine.drop_privileges(setup["uid"], setup["gid"], mortal, setup["reads_all"])
    program = confine.filter_program(
        guard=None if own_processes else os.getpid(),
        network=setup["own_network"] or facts["namespaces"],
    )
    facts["filter"] = program is not None and confine.install_filter(program)
    facts["uid"] = os.getuid()
    import testrun

    confine.protect()
    facts["shielded"] = confine.is_shielded(channel)
    shares_user = not own_processes and setup["uid"] is None
    runner = Runner(channel, answers, setup, facts, shares_user)
    try:
        testrun.serve_from_pytest(runner.serve, setup["workspace"], setup["library"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)  # EX_SOFTWARE; a child that failed must not go on as the runner


if __name__ == "__main__":
    main()
