"""What a CPU host needs so that training is limited by arithmetic rather than by page faults."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>: parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process reuse large freed blocks instead of returning them to the kernel.

    XLA:CPU allocates its temporaries anew at every step. glibc maps blocks of that size from the
    kernel and unmaps them again, so every page faults at every step; a training step of the tiny
    preset then takes two to three times as long, a large elementwise operation ten times. Call it
    before large arrays exist. The process keeps its peak memory until it ends.

    Returns False where the C library has no mallopt (not glibc): then nothing has changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Arenas of other threads cannot grow past 64 MiB, so large blocks need the main one.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
