"""The hosts of one run: processes that train together, each with its own devices and its own rows.

They talk through JAX's coordination service, a key-value store on host 0, and not through their
devices: whoever waits here for a slower host, during a rollout say, holds up no accelerator, and no
timeout of a collective runs. On a single host everything here answers at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax

_WAIT_MS = 2000  # in one call: in between, signals are answered
_TURN = "remend/turn"
_turns: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
_course: ContextVar[str] = ContextVar("course", default="main")
_leaving = threading.Event()


def _state() -> Any:
    # JAX has public names for some of this, but none for the store, and those for the numbers
    # start its devices. Orbax, which saves every checkpoint, reads the same object.
    from jax._src import distributed

    return distributed.global_state


def host_index() -> int:
    """This host's number; host 0 writes what a run has one of."""
    return _state().process_id


def host_count() -> int:
    """Hosts of this run."""
    return _state().num_processes


def store() -> Any:
    """The coordination service's key-value store; None on a single host."""
    return _state().client


@contextlib.contextmanager
def beside(course: str) -> Iterator[None]:
    """What hosts agree on in here, they do in an order of its own: beside, in another thread, they
    go on agreeing on other things. Nothing in here may compute together on their devices."""
    token = _course.set(course)
    try:
        yield
    finally:
        _course.reset(token)


def agree(value: Any) -> list[Any]:
    """What each host gave (JSON), by host. Every host calls it, in the same order."""
    if host_count() == 1:
        return [value]
    course = _course.get()
    turns, shared, turn = f"{_TURN}/{course}", store(), next(_turns[course])
    shared.key_value_set(f"{turns}/{turn}/{host_index()}", json.dumps(value))
    if host_index() == 0:
        given = [_wait_for(shared, f"{turns}/{turn}/{host}") for host in range(host_count())]
        shared.key_value_set(f"{turns}/{turn}/all", f"[{','.join(given)}]")
        # all hosts have come to this turn, so they have read the one before
        shared.key_value_delete(f"{turns}/{turn - 1}")
    return json.loads(_wait_for(shared, f"{turns}/{turn}/all"))


def leave() -> None:
    """This host is about to end with an error: threads of its own that wait for other hosts stop
    waiting, or it could not end, and none would hear of it."""
    _leaving.set()


def _wait_for(shared: Any, key: str) -> str:
    while True:
        if _leaving.is_set():
            raise RuntimeError("this host ends, and waits for no other")
        try:
            return shared.blocking_key_value_get(key, _WAIT_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def barrier(name: str) -> None:
    """Wait until all hosts are at the barrier of this name."""
    names = agree(name)
    if len(set(names)) > 1:
        raise RuntimeError(f"hosts are at different places: {', '.join(map(repr, names))}")


def exists(path: Path) -> bool:
    """Whether host 0 sees `path`: hosts must not decide by what each sees at its own moment."""
    return agree(path.exists())[0]
