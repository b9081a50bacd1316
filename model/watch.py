"""No host outlives another: what ends the rest, in one line, when one of them is gone.

A collective waits for ever for a host that died, and a rollout does not notice at all. So a thread
of every host beats in the key-value store of host 0 and looks whether the others do. JAX's own
heartbeat cannot say what happened: it aborts the process from within, behind a page of log. It is
kept as the second line of defence, and the only one when host 0, with the store, is gone; what it
aborts still ends in our line.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from typing import Any

BEAT_S = 2.0
LOST_S = 25.0  # without a beat
JAX_LOST_S = 50  # of its own heartbeat: it takes two thirds of this at least, ours comes first
LOST = 70  # exit code: EX_SOFTWARE of sysexits.h

_ROOT = "remend/beat"
_RESUME = "start all hosts again with the same command: they resume from the last checkpoint"


class Watch(threading.Thread):
    """Beats for this host until `close`; ends the process when another host failed or is silent.

    A beat carries whether this host knows of a `notice` to stop (``model/preempt.py``), which all
    then know within `BEAT_S`, and why it failed, if it did.
    """

    def __init__(self, store: Any, host: int, hosts: int, notice: threading.Event) -> None:
        super().__init__(name="watch", daemon=True)
        self._store, self._host, self._hosts, self._notice = store, host, hosts, notice
        self._closed, self._spoken = threading.Event(), threading.Event()
        self._posting = threading.Lock()
        self._beats = 0
        self._failed: tuple[str, int] | None = None
        self._last: dict[int, tuple[int, float]] = {}  # beat of each host, and when it came

    def run(self) -> None:
        began = time.monotonic()
        self._last = {host: (0, began) for host in range(self._hosts) if host != self._host}
        while not self._closed.wait(BEAT_S):
            try:
                self._beat()
                self._look()
            except Exception:  # no answer from the store: for JAX's own heartbeat to decide
                continue

    def close(self) -> None:
        """Stop watching: all hosts are done."""
        self._closed.set()
        self.join()

    def await_verdict(self) -> None:
        """Let it be found first whether another host is gone; if so, this does not return."""
        if self._spoken.wait(LOST_S + 2 * BEAT_S):
            time.sleep(LOST_S)

    def fail(self, why: str, code: int) -> None:
        """Tell the others that this host ends with exit code `code`, and give them time to hear."""
        self._failed = why, code
        on_abort("", code)  # host 0 may hear it, and go, before that time is over
        try:
            self._beat()
        except Exception:  # the store is gone, and with it who would hear
            return
        time.sleep(2 * BEAT_S)

    def _beat(self) -> None:
        with self._posting:
            self._beats += 1
            notice = self._notice.is_set()
            beat = {"beat": self._beats, "notice": notice, "failed": self._failed}
            self._store.key_value_set(
                f"{_ROOT}/{self._host}", json.dumps(beat), allow_overwrite=True
            )

    def _look(self) -> None:
        for key, text in self._store.key_value_dir_get(_ROOT):
            host, beat = int(key.rpartition("/")[2]), json.loads(text)
            if host == self._host:
                continue
            if beat["notice"]:
                self._notice.set()
            if beat["beat"] != self._last[host][0]:
                self._last[host] = beat["beat"], time.monotonic()
            if beat["failed"]:
                why, code = beat["failed"]
                self._leave(f"host {host} has failed: {why}", code)
        for host, (_, when) in self._last.items():
            if time.monotonic() - when > LOST_S:
                self._leave(f"no sign of host {host} for {LOST_S:.0f} s; {_RESUME}", LOST)

    def _leave(self, why: str, code: int) -> None:
        if self._failed is not None or self._closed.is_set():
            return
        self._spoken.set()
        _say(f"host {self._host} stops: {why}")
        if self._host == 0:  # the store goes with it: let the others see for themselves first
            time.sleep(2 * BEAT_S)
        os._exit(code)  # whatever the other threads wait for


def _say(line: str) -> None:
    os.write(2, f"remend: error: {line}\n".encode())


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # kept: C holds no reference


def catch_abort(host: int) -> None:
    """Let an abort from within JAX end in one line of ours, and our exit code.

    It comes when host 0 is gone, at once where its machine closes the connection, or for a fault in
    JAX itself: the log before our line says which.
    """
    other = "another host" if host == 0 else "host 0"
    line = f"host {host} stops: JAX has lost touch with {other} (its log is above); {_RESUME}"
    on_abort(line, LOST)


def on_abort(line: str, code: int) -> None:
    """What an abort of this process is turned into: `line` on stderr, if any, and an exit code."""

    def leave(_: int) -> None:
        if line:
            _say(line)
        os._exit(code)

    # A handler in C's sense: Python's own would wait for the main thread, which may never return.
    _handlers.append(_Handler(leave))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])
