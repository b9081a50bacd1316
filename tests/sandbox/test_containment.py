"""Code that wants out, or wants everything: it gets neither, and the harness goes on as before."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

from sandbox.base import SandboxError, Tree
from sandbox.isolation import plain_user
from tests.sandbox.box import BACKENDS, DOCKER, KINDS, LIMITS, Box, make_tree

GOOD = ["tests/test_mod.py::test_add"]
PYTHON = "python3"
SLACK_S = 6.0  # on a busy machine


@pytest.fixture(scope="module", params=[*KINDS, *DOCKER])
def box(request):
    box = Box(request.param)
    yield box
    box.close()


@pytest.fixture(scope="module", params=[*BACKENDS, *DOCKER])
def files(request):
    """As `box`, for what is the same with and without namespaces."""
    box = Box(request.param)
    yield box
    box.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("contain") / "tree")


def run(box: Box, tree: Tree, *argv: str, timeout_s: float | None = None):
    """One command, and the proof that tests still run after it, in this lease and in the next."""

    async def work():
        async with box.pool.lease(tree) as sandbox:
            began = time.monotonic()
            result = await sandbox.exec(argv, timeout_s=timeout_s)
            assert time.monotonic() - began < (timeout_s or LIMITS.wall_s) + SLACK_S
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
        async with box.pool.lease(tree) as sandbox:
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
            assert await sandbox.diff() == ""
        return result

    return box.run(work())


def run_test(box: Box, tree: Tree, source: str, timeout_s: float | None = None):
    """The report on `test` in a file of its own, after one that passes; then as in `run`."""
    overlay = {"tests/test_bad.py": f"def test_good(): pass\n{source}".encode()}
    names = ["tests/test_bad.py::test_good", "tests/test_bad.py::test"]

    async def work():
        async with box.pool.lease(dataclasses.replace(tree, overlay=overlay)) as sandbox:
            began = time.monotonic()
            report = await sandbox.run_tests(names, timeout_s=timeout_s)
            assert time.monotonic() - began < (timeout_s or LIMITS.wall_s) + SLACK_S
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
        async with box.pool.lease(tree) as sandbox:
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
        return report

    report = box.run(work())
    assert not report.passed(names)
    return report


# -- time, memory, processes, output


DEAF = (
    "import signal\n"
    "for n in range(1, 65):\n"
    "    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
)


def test_a_loop_ends_at_the_deadline(box: Box, tree: Tree) -> None:
    result = run(box, tree, PYTHON, "-c", DEAF + "while True: pass", timeout_s=0.5)
    assert (result.timed_out, result.killed_by, result.exit_code) == (True, "deadline", -9)
    report = run_test(box, tree, f"{DEAF}\ndef test():\n    while True: pass", timeout_s=0.5)
    assert (report.timed_out, report.killed_by) == (True, "deadline")
    assert [case.outcome for case in report.cases] == ["passed", "missing"]


def test_a_fork_bomb_is_put_out(box: Box, tree: Tree) -> None:
    # as root without a spare user the number is only watched: a bomb of bounded size
    bomb = "import os, time\nfor _ in range(8):\n    os.fork()\ntime.sleep(30)"
    result = run(box, tree, PYTHON, "-c", DEAF + bomb, timeout_s=2.0)
    assert result.exit_code != 0
    if not result.stderr:  # unless fork itself was refused, and that ended it
        assert result.killed_by in ("processes", "deadline")
    report = run_test(box, tree, f"def test():\n{_indent(bomb)}", timeout_s=2.0)
    assert report.killed_by in ("processes", "deadline") or report.cases[1].outcome == "failed"


@pytest.mark.skipif(os.geteuid() == 0 and plain_user()[0] is None, reason="no spare user")
def test_the_kernel_counts_processes(box: Box, tree: Tree) -> None:
    # each is told at once: the runner's own look at them comes too late to hide one too many
    code = "import os, time\nfor n in range(200):\n"
    code += "    try: pid = os.fork()\n    except OSError: break\n"
    code += "    if pid == 0: time.sleep(30)\n    os.write(1, b'.')\n"
    result = run(box, tree, PYTHON, "-c", code)
    assert 0 < len(result.stdout) < box.pool.limits.processes


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def test_one_process_gets_no_more_memory_than_allowed(box: Box, tree: Tree) -> None:
    result = run(box, tree, PYTHON, "-c", "x = bytearray(1 << 30); print(len(x))")
    assert (result.killed_by, result.stdout) == ("memory", "")
    report = run_test(box, tree, "def test():\n    assert bytearray(1 << 30)")
    assert report.killed_by == "memory"
    assert report.cases[1].error == "MemoryError"


def test_many_processes_get_no_more_memory_together(box: Box, tree: Tree) -> None:
    code = (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if os.fork() == 0:\n"
        "        x = bytearray(100 << 20); time.sleep(20); os._exit(0)\n"
        "for _ in range(6): os.wait()"
    )
    result = run(box, tree, PYTHON, "-c", code)
    assert result.killed_by == "memory"


@pytest.mark.parametrize("place", [".", "$TMPDIR"])
def test_files_are_memory_too(files: Box, tree: Tree, place: str) -> None:
    script = f"for n in $(seq 200); do head -c 7M /dev/zero > {place}/f$n || exit 1; done"
    result = run(files, tree, "sh", "-c", script, timeout_s=10.0)
    full = "No space" in result.stderr  # its own temporary folder, which is smaller
    assert result.killed_by == "memory" or (place != "." and full)


@pytest.mark.parametrize("kind", [*BACKENDS[:1], *DOCKER])
def test_empty_files_are_memory_too(kind: str, tree: Tree) -> None:
    box = Box(kind, dataclasses.replace(LIMITS, memory_mib=32))

    async def work():
        async with box.pool.lease(tree) as sandbox:
            script = "mkdir d; cd d; seq 1000000 | xargs touch"
            return await sandbox.exec(["sh", "-c", script], timeout_s=15.0)

    result = box.run(work())
    box.close()
    assert result.killed_by == "memory"


def test_a_file_may_not_grow_beyond_its_limit(files: Box, tree: Tree) -> None:
    result = run(files, tree, "sh", "-c", "head -c 20M /dev/zero > big; stat -c %s big")
    assert int(result.stdout) == LIMITS.file_mib << 20


def test_endless_output_is_cut(box: Box, tree: Tree) -> None:
    result = run(box, tree, "yes", "x" * 100)
    assert result.killed_by == "output"
    assert len(result.stdout) == LIMITS.output_bytes
    result = run(box, tree, "sh", "-c", "yes >&2")
    assert result.killed_by == "output"
    assert len(result.stderr) == LIMITS.output_bytes
    report = run_test(box, tree, "import os\ndef test():\n    while True: os.write(1, b'x' * 9999)")
    assert not report.cases[1].outcome == "passed"
    report = run_test(
        box,
        tree,
        "def test(capfd):\n    with capfd.disabled():\n        while True: print('x' * 99)",
    )
    assert report.killed_by == "output"


def test_a_daemon_does_not_outlive_its_request(box: Box, tree: Tree) -> None:
    daemon = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"{_indent(_indent(DEAF))}"
        "        for _ in range(200):\n"
        "            open('alive', 'a').write('x'); time.sleep(0.01)\n"
    )

    async def work():
        async with box.pool.lease(tree) as sandbox:
            result = await sandbox.exec([PYTHON, "-c", daemon])
            assert (result.exit_code, result.killed_by) == (0, None)
            sizes = []
            for _ in range(2):
                done = await sandbox.exec(["sh", "-c", "sleep 0.1; cat alive | wc -c"])
                sizes.append(done.stdout)
            return sizes

    first, second = box.run(work())
    assert first == second


def test_output_held_open_by_a_daemon_does_not_hold_the_answer(box: Box, tree: Tree) -> None:
    began = time.monotonic()
    result = run(box, tree, "sh", "-c", "setsid sleep 4 & echo done")
    assert result.stdout == "done\n" and time.monotonic() - began < 3.5


# -- the runner


ATTACKS = [
    "os.kill(os.getppid(), signal.SIGKILL)",
    "os.kill(os.getppid(), signal.SIGSTOP)",
    "os.kill(os.getppid(), signal.SIGINT)",
    "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGKILL)",
    "os.kill(-1, signal.SIGKILL)",
    "resource.prlimit(os.getppid(), resource.RLIMIT_AS, (1, 1))",
    "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
    "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "os.sched_setaffinity(os.getppid(), {0})",
    "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "assert ctypes.CDLL(None).shmget(7, 4096, 0o1666) >= 0",
    "assert ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0",  # keyctl on x86_64
    "os.setuid(0) if os.getuid() else os.setuid(1)",
    "os.chroot('.')",
    "socket.socket(socket.AF_VSOCK)",
    "socket.socket(38, socket.SOCK_SEQPACKET)",  # the kernel's cryptography
]
APART_ONLY = [  # elsewhere root may look at root's
    "os.listdir(f'/proc/{os.getppid()}/fd')",
    "open(f'/proc/{os.getppid()}/oom_score_adj', 'w').write('0')",
]


def test_the_runner_is_out_of_reach(box: Box, tree: Tree) -> None:
    """Every attack fails, and none ends the attacker's own supervision."""
    attacks = [*ATTACKS, *(APART_ONLY if box.pool.backend != "plain" else [])]
    code = (
        "import ctypes, os, resource, signal, socket\n"
        f"for attack in {attacks!r}:\n"
        "    try: exec(attack)\n"
        "    except (OSError, AssertionError): continue\n"
        "    print(attack)\n"
        "print('end')"
    )

    async def work():
        async with box.pool.lease(tree) as sandbox:
            connection = "_stream" if box.pool.backend == "docker" else "_channel"
            before = getattr(sandbox._slot, connection)
            result = await sandbox.exec([PYTHON, "-c", code])
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
            assert getattr(sandbox._slot, connection) is before  # the same runner all the time
            return result.stdout.splitlines(), result.stderr

    (*succeeded, end), stderr = box.run(work())
    assert end == "end", stderr
    if box.namespaces:  # signals to its process 1 are dropped without an error
        succeeded = [attack for attack in succeeded if "signal." not in attack]
    assert not succeeded


def test_a_test_cannot_end_the_run_as_if_it_had_passed(box: Box, tree: Tree) -> None:
    for way in ("os._exit(0)", "os.kill(os.getpid(), 9)", "pytest.exit('x', 0)", "sys.exit(0)"):
        report = run_test(box, tree, f"import os, pytest, sys\ndef test():\n    {way}")
        assert report.cases[0].outcome == "passed" and report.cases[1].outcome != "passed"


def test_rubbish_in_the_report_does_no_harm(files: Box, tree: Tree) -> None:
    lines = (
        b'{"test": 1}', b'{"test": "tests/test_bad.py::test", "outcome": "splendid"}', b"[[[[",
        b'{"collector": []}', b'{"test": ["x"], "outcome": "passed"}', b"[" * 99999, b"\xff\xfe",
        b'{"test": "tests/test_bad.py::test", "outcome": "failed", "frames": [[1, 2, 3, 4]]}',
        b'{"ahead": ["os; bad", 3, "antigravity", "../x"]}', b"null", b"1e999", b'"x"',
    )  # fmt: skip
    source = (
        "import os\ndef test():\n"
        "    for fd in range(3, 40):\n"
        f"        for line in {lines!r}:\n"
        "            try: os.write(fd, line + b'\\n')\n"
        "            except OSError: break\n"
        "    os._exit(0)"
    )
    assert run_test(files, tree, source).cases[1].outcome == "missing"


# -- files


def test_links_and_pipes_lead_nowhere(files: Box, tree: Tree, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    script = (
        f"ln -s {secret} file; ln -s {tmp_path} folder; ln -s / root; mkfifo pipe;"
        "ln -s ../../../../etc up; ln src/mod.py hard; mkdir real; ln -s loop loop"
    )

    async def work():
        async with files.pool.lease(tree) as sandbox:
            assert (await sandbox.exec(["sh", "-c", script])).exit_code == 0
            for path in (
                *("file", "folder/secret", "root/etc/passwd", "pipe", "up/passwd", "hard", "real"),
                *(
                    "../secret",
                    "/etc/passwd",
                    "real/../../x",
                    "",
                    ".",
                    "a\0b",
                    "x" * 2000,
                    "\udcff",
                ),
                *("loop", "loop/x", "src/mod.py/x", "missing/x", "src/mod.py/"),
            ):
                if path == "src/mod.py/":
                    continue
                with pytest.raises(SandboxError):
                    await sandbox.read(path)
            for path in ("folder/planted", "root/tmp/planted", "../planted", "real", "loop/x"):
                with pytest.raises(SandboxError):
                    await sandbox.write(path, b"x")
            # a link where a file was is replaced, not followed
            await sandbox.write("file", b"mine")
            assert await sandbox.read("file") == b"mine"
            assert "secret" not in await sandbox.diff()

    files.run(work())
    assert secret.read_text() == "secret" and os.listdir(tmp_path) == ["secret"]


def test_a_large_file_is_not_read(files: Box, tree: Tree) -> None:
    async def work():
        async with files.pool.lease(tree) as sandbox:
            await sandbox.exec(["sh", "-c", "truncate -s 7M large"])
            with pytest.raises(SandboxError, match="larger"):
                await sandbox.read("large")
            assert "large" not in await sandbox.diff()

    files.run(work())


PLACES = {
    ".": "drwxr-xr-x",
    "src": "drwxr-xr-x",
    "src/mod.py": "-rw-r--r--",
    "tests/conftest.py": "-rw-r--r--",
    "link": "lrwxrwxrwx",
}


@pytest.mark.parametrize(
    "script",
    [
        "chmod 000 tests/conftest.py src tests .",
        "rm -rf src tests; ln -s / src; ln -s /etc tests",
        "rm -rf src; echo file > src",
        "rm src/mod.py; mkdir -p src/mod.py/deep",
        "mv src other; cp -r other src; touch -r other/mod.py src/mod.py; chmod 777 src",
        "sed -i 's/+/-/' src/mod.py; touch -d @0 src/mod.py",
        "cp -p src/mod.py m; echo 'raise SystemExit' > src/mod.py; touch -r m src/mod.py",
        "ln src/mod.py second",
        "python3 -c \"import os\nfor _ in range(2500): os.mkdir('d'); os.chdir('d')\"",
        "mkdir -p a/b/c/d; touch a/b/c/d/e; chmod 0 a/b/c a/b a",
        "python3 -c \"import os; open(b'\\xff\\n', 'w'); os.symlink('x', b'\\xfe')\"",
        'mkdir -p src/__pycache__ && python3 -c "import sys; sys.dont_write_bytecode = False\n'
        'import mod" && for f in src/__pycache__/*; do head -c 16 $f > x; mv x $f; done',
    ],
)
def test_a_spoilt_workspace_is_made_good(files: Box, tree: Tree, script: str) -> None:
    async def work():
        async with files.pool.lease(tree) as sandbox:
            assert (await sandbox.exec(["sh", "-c", script])).exit_code == 0
            await sandbox.diff()
            await sandbox.reset(tree)
            assert await sandbox.diff() == ""
            assert (await sandbox.run_tests(GOOD)).passed(GOOD)
            modes = await sandbox.exec(["stat", "-c", "%A %n", *PLACES])
            assert modes.stdout.splitlines() == [f"{mode} {path}" for path, mode in PLACES.items()]

    files.run(work())


def test_temporary_files_do_not_pass_to_the_next_lease(files: Box, tree: Tree) -> None:
    script = 'echo x > "$TMPDIR/left"; echo x > "$HOME/left"; echo x > /dev/shm/remend-left'

    async def work():
        found = []
        for _ in range(3):
            async with files.pool.lease(tree) as sandbox:
                look = 'ls -A "$TMPDIR" "$HOME" /dev/shm | grep -c left'
                found.append((await sandbox.exec(["sh", "-c", look])).stdout.strip())
                if files.pool.backend != "plain":
                    await sandbox.exec(["sh", "-c", script])
                else:
                    await sandbox.exec(["sh", "-c", script.rpartition(";")[0]])
        return found

    assert files.run(work()) == ["0", "0", "0"]


# -- the machine


def test_the_machines_environment_is_not_seen(files: Box, tree: Tree, monkeypatch) -> None:
    monkeypatch.setenv("A_SECRET_OF_THE_HOST", "key")
    fresh = Box(files.pool.backend)
    result = run(fresh, tree, "env")
    fresh.close()
    assert "A_SECRET_OF_THE_HOST" not in result.stdout
    assert {"PYTHONHASHSEED=0", "TZ=UTC", "LANG=C.UTF-8"} < set(result.stdout.splitlines())


def test_no_server_of_the_machine_is_reached(box: Box, tree: Tree) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for target in ("127.0.0.1", "::ffff:127.0.0.1", "8.8.8.8"):
            code = f"import socket\nsocket.create_connection(({target!r}, {port}), 1)"
            result = run(box, tree, PYTHON, "-c", code)
            assert result.exit_code != 0
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("kind", [*BACKENDS, *DOCKER])
def test_tests_may_use_a_loopback_of_their_own(kind: str, tree: Tree) -> None:
    source = (
        "import socket, threading\n"
        "def test():\n"
        "    with socket.create_server(('127.0.0.1', 0)) as server:\n"
        "        with socket.create_connection(server.getsockname()): server.accept()\n"
    )
    box = Box(kind)
    overlay = {"tests/test_net.py": source.encode()}

    async def work():
        async with box.pool.lease(dataclasses.replace(tree, overlay=overlay)) as sandbox:
            return await sandbox.run_tests(["tests/test_net.py::test"])

    report = box.run(work())
    box.close()
    assert report.exit_code == 0, report


@pytest.mark.skipif("bwrap" not in BACKENDS, reason="bubblewrap does not work here")
def test_the_machines_files_are_not_there(tree: Tree, tmp_path) -> None:
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o777)
    box = Box("bwrap")
    script = (
        f"cat {tmp_path}/secret; cat /etc/shadow /etc/hostname; ls /home /mnt /sys /var;"
        f"echo x > {tmp_path}/planted; ls -d /usr/lib/python3*/site-packages/*;"
        "for d in / /usr /etc /run/remend /dev; do echo x > $d/x; done; ls -A /root 2>/dev/null"
    )
    result = run(box, tree, "sh", "-c", script)
    identity = run(
        box, tree, "sh", "-c", "id -u; cat /etc/passwd; grep -i capeff /proc/self/status"
    )
    box.close()
    assert result.stdout.strip() in ("", ".pyenv")  # where the interpreter lies
    assert not (tmp_path / "planted").exists()
    assert identity.stdout.split()[0] != "0" or os.getuid() != 0
    assert identity.stdout.rstrip().endswith("0000000000000000")
