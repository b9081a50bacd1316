"""Measuring peers in turn: every round visits each once, so that the machine's drift hits all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tools.bench.peer import Call, PeerFailed, Worker


@dataclass(frozen=True)
class Track:
    """What one peer did in one measure: all its calls, of which the first `untimed` warm it up."""

    versions: dict[str, str]
    calls: list[Call]
    untimed: int

    @property
    def timed(self) -> list[Call]:
        """One call a round."""
        return self.calls[self.untimed :]


def measure(
    starts: Mapping[str, Callable[[], Worker]],
    warmup: int,
    repetitions: int,
    on_call: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Track], dict[str, str]]:
    """Tracks by peer, and for each peer that failed the line that says why.

    Processes load side by side; from the first call on only one works at a time.

    Args:
        starts: by peer, what starts its worker. They are visited in this order.
        on_call: told the name of the peer after each of its 1 + warmup + repetitions calls.
    """
    workers: dict[str, Worker] = {}
    tracks: dict[str, Track] = {}
    failed: dict[str, str] = {}

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            yield
        except PeerFailed as error:
            failed[name] = str(error)
            tracks.pop(name, None)

    def call(name: str) -> Call:
        done = workers[name].call()
        on_call(name)
        return done

    versions: dict[str, dict[str, str]] = {}
    try:
        for name, start in starts.items():
            with noted(name):
                workers[name] = start()
        for name, worker in workers.items():
            with noted(name):
                versions[name] = worker.ready()
        for name, found in versions.items():
            with noted(name):
                calls = [call(name) for _ in range(1 + warmup)]
                tracks[name] = Track(found, calls, untimed=len(calls))
        for _ in range(repetitions):
            for name in list(tracks):
                with noted(name):
                    tracks[name].calls.append(call(name))
    finally:
        for worker in workers.values():
            worker.close()
    return tracks, failed
