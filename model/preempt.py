"""SIGTERM: what a scheduler sends to a host, or to all, before it takes the machines away.

One host's notice is every host's (``model/watch.py`` passes it on). They act on it together, where
all of them are at the same step: they save, and end with the exit code that says "again, please".
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from model.hosts import agree

T = TypeVar("T")

NOTICE = threading.Event()  # signals belong to the process, and so does this
_POLL_S = 0.5


def listen() -> None:
    """Take SIGTERM as a notice from here on. Replaces JAX's handler, which keeps it to itself."""
    signal.signal(signal.SIGTERM, lambda *_: NOTICE.set())


def noticed_by_any() -> bool:
    """Whether any host knows of a notice: the same answer on all, which call this together."""
    return any(agree(NOTICE.is_set()))


async def unless_noticed(work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None where a notice came first, and it was cancelled."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done() and not NOTICE.is_set():
            await asyncio.wait([task], timeout=_POLL_S)
        if task.done():
            return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    return None
