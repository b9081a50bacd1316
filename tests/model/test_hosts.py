"""What hosts agree on, with a store whose other host never comes."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from model import hosts


class Store:
    """Host 1's view where host 0 says nothing."""

    def key_value_set(self, key: str, value: str) -> None:
        pass

    def blocking_key_value_get(self, key: str, wait_ms: int) -> str:
        time.sleep(0.02)
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")


def test_a_host_that_fails_can_end_though_its_thread_waits_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An event loop waits for its threads before it gives the error on, by which all would hear."""
    state = SimpleNamespace(process_id=1, num_processes=2, client=Store())
    monkeypatch.setattr(hosts, "_state", lambda: state)
    monkeypatch.setattr(hosts, "_leaving", threading.Event())

    async def fail() -> None:
        waiting = asyncio.create_task(asyncio.to_thread(hosts.agree, 1))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        hosts.leave()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        asyncio.run(fail())
