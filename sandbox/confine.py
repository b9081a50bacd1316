"""What the runner does to itself before it serves: namespaces, user, capabilities, system calls.

Runs inside the sandbox, imports the standard library only. Each step lasts for the life of the
process and is inherited by everything it forks; none can be undone from inside.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import signal
import socket
import struct
import sys

# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 22, 24, 36
PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 47, 2
CAP_DAC_READ_SEARCH = 2  # linux/capability.h
# linux/sched.h
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC = 1 << 28, 1 << 30, 1 << 29, 1 << 27
ANY_NEW_NAMESPACE = 0x7E020000

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *args: int) -> None:
    """`prctl(2)`; raises OSError."""
    padded = [ctypes.c_ulong(value) for value in (*args, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *padded) != 0:
        raise OSError(ctypes.get_errno(), "prctl", str(option))


def enter_namespaces(channel: int) -> bool:
    """Leave the host's network, processes and IPC, if the kernel lets us; False if it does not.

    On success the caller continues in a forked child that is process 1 of its own process
    namespace; the original process closes `channel`, waits for it and ends as it ends.
    """
    # in a child first: a step may be refused when the ones before it cannot be taken back
    trial = os.fork()
    if trial == 0:
        try:
            _unshare()
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(trial, 0)[1] != 0:
        return False
    _unshare()
    child = os.fork()
    if child:
        os.close(channel)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    return True


def _unshare() -> None:
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    if uid != 0:
        flags |= CLONE_NEWUSER
    if _libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if uid != 0:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _loopback_up()


def _loopback_up() -> None:
    """Bring `lo` up in a fresh network namespace (SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, 0x8913, struct.pack("16sH22x", b"lo", 0))
        flags = struct.unpack("16sH22x", request)[1] | 1
        fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"lo", flags))


def drop_privileges(
    uid: int | None, gid: int | None, die_with_parent: bool, reads_all: bool
) -> None:
    """Become `uid`/`gid` (None: stay) with no capabilities and no way to gain any.

    `reads_all`: but for one, which what it runs inherits: to read every file.
    """
    if reads_all:
        prctl(PR_SET_KEEPCAPS, 1)  # for what the change of user would clear
    if uid is not None and gid is not None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    # clearing capabilities and changing the user both clear the death signal: set it last
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one, or nothing left to drop with
    kept = (1 << CAP_DAC_READ_SEARCH) if reads_all else 0
    # version 3: effective, permitted, inheritable, of 32 capabilities and of 32 more
    header, sets = struct.pack("II", 0x20080522, 0), struct.pack("6I", *[kept] * 3, 0, 0, 0)
    if _libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    if reads_all:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL if die_with_parent else 0)


# syscall -> number on (x86_64, aarch64); include/uapi/asm-generic/unistd.h, syscall_64.tbl
_DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "syslog": (103, 116),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # System V and POSIX queues would outlive a lease
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
# refused unless this argument is 0, the caller itself: the runner's limits are not theirs to set
_ONLY_ITSELF = {
    "prlimit64": ((302, 261), 0),
    "setpriority": ((141, 140), 1),
    "sched_setparam": ((142, 118), 0),
    "sched_setscheduler": ((144, 119), 0),
    "sched_setaffinity": ((203, 122), 0),
    "sched_setattr": ((314, 274), 0),
    "ioprio_set": ((251, 30), 1),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_KILL, _TKILL, _TGKILL, _SIGQUEUE = (62, 129), (200, 130), (234, 131), (129, 138)
_PIDFD_OPEN = (434, 434)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _AND, _RETURN, _AT_LEAST = 0x20, 0x15, 0x54, 0x06, 0x35  # linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h


def filter_program(guard: int | None, network: bool) -> bytes | None:
    """A seccomp filter (classic BPF), or None on a machine whose call numbers are not known here.

    `guard`: a process that may not be signalled, for where no process namespace protects it; then
    `kill(-1)` is refused too. `network`: whether internet sockets may be made (a network namespace
    is around us); local ones always may.
    """
    if platform.machine() not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[platform.machine()]
    code: list[tuple[int, int, int, int]] = []

    def refuse(error: int) -> tuple[int, int, int, int]:
        return (_RETURN, 0, 0, _ERRNO | error)

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index)  # low word, little endian

    def on(number: int, *body: tuple[int, int, int, int]) -> None:
        """Run `body` if the call is `number`; a body that does not return allows."""
        code.append((_EQUAL, 0, len(body) + 1, number))
        code.extend(body)
        code.append((_RETURN, 0, 0, _ALLOW))

    code += [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), refuse(errno.EPERM), (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 calls
        code += [(_AT_LEAST, 0, 1, 0x40000000), refuse(errno.EPERM)]
    for numbers in _DENIED.values():
        code += [(_EQUAL, 0, 1, numbers[column]), refuse(errno.EPERM)]
    for numbers, index in _ONLY_ITSELF.values():
        on(numbers[column], argument(index), (_EQUAL, 1, 0, 0), refuse(errno.EPERM))
    # clone3's flags lie behind a pointer: the C library falls back to clone
    code += [(_EQUAL, 0, 1, _CLONE3[column]), refuse(errno.ENOSYS)]
    on(
        _CLONE[column],
        argument(0),
        (_AND, 0, 0, ANY_NEW_NAMESPACE),
        (_EQUAL, 1, 0, 0),
        refuse(errno.EPERM),
    )
    families = [socket.AF_UNIX]
    if network:
        families += [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK]
    allowed = [(_EQUAL, len(families) - i, 0, family) for i, family in enumerate(families)]
    on(_SOCKET[column], argument(0), *allowed, refuse(errno.EACCES))
    if guard is not None:
        for numbers in (_KILL, _TKILL, _TGKILL, _SIGQUEUE, _PIDFD_OPEN):
            on(
                numbers[column],
                argument(0),
                (_EQUAL, 1, 0, guard),
                (_EQUAL, 0, 1, 0xFFFFFFFF),
                refuse(errno.EPERM),
            )
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in code)


def install_filter(program: bytes) -> bool:
    """Put `program` in force for this process and its children; False if the kernel has none."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(head, len(head))
    try:
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(holder))
    except OSError:
        return False
    return True


def protect() -> None:
    """Close this process to its children: no tracing, no /proc access, orphans come back to us."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_DUMPABLE, 0)
    # as process 1 of a namespace only signals with a handler reach us, and Python installs one
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def is_shielded(channel: int) -> bool:
    """Whether a child cannot open our descriptors by way of /proc, by letting one try.

    gVisor lets it (release 20221219 does), whatever `protect` says.
    """
    pid = os.fork()
    if pid == 0:
        expose()
        try:
            os.open(f"/proc/{os.getppid()}/fd/{channel}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def expose() -> None:
    """In a forked child: undo `protect` where it would differ from an ordinary process."""
    prctl(PR_SET_DUMPABLE, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def first_to_be_killed() -> None:
    """When the machine runs out of memory, the kernel shall take us first."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError as error:
        print(f"oom_score_adj: {error}", file=sys.stderr)
