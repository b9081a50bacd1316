"""The rows of pre-training: made from functions here, or ahead of the learner in other processes.

What a step learns from is a function of the seed and the step alone, so that a resumed run agrees
with an undisturbed one, whoever makes the rows.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from configs.errors import InputError
from configs.files import write_atomic
from model.tokenizer import Tokenizer
from sandbox.mutate import Edit
from sft.chat import Renderer
from sft.packing import Example, Rows, pack
from sft.synthetic import Function, MixConfig, RepairEpisodes

AHEAD = 4  # batches that each process may be ahead of the learner


@dataclass(frozen=True)
class RowsConfig:
    """Rows [batch_rows, row_tokens] a step, with at most `row_targets` loss tokens each.

    Attributes:
      workers: processes that make rows ahead of the learner; 0: the learner's own, in turn.
    """

    batch_rows: int = 8
    row_tokens: int = 768
    row_targets: int = 384
    workers: int = 0


class StepRows:
    """The rows of any step of a run with this seed."""

    def __init__(
        self,
        config: RowsConfig,
        mix: MixConfig,
        functions: Sequence[Function],
        renderer: Renderer,
        seed: int,
    ) -> None:
        self._config, self._mix, self._seed = config, mix, seed
        self._functions, self._renderer = functions, renderer

    def of(self, step: int) -> Rows:
        """The `batch_rows` fullest of the rows that slightly more examples than needed fill."""
        config = self._config
        rows = pack(self._examples(step), config.row_tokens, config.row_targets)
        full = np.argsort(-(rows.segments > 0).sum(axis=1), kind="stable")[: config.batch_rows]
        return rows.select(np.sort(full))

    def between(self, start: int, end: int) -> Iterator[Rows]:
        """The rows of steps start..end-1."""
        return (self.of(step) for step in range(start, end))

    def _examples(self, step: int) -> list[Example]:
        config = self._config
        seed = self._seed * 1_000_003 + step
        episodes = RepairEpisodes(self._functions, self._renderer, seed, self._mix)
        wanted = config.batch_rows * config.row_tokens * 11 // 10
        found: list[Example] = []
        while sum(len(e.ids) for e in found) < wanted:
            example = episodes.example()
            tokens, targets = len(example.ids), sum(1 for w in example.weight if w)
            if tokens <= config.row_tokens and targets <= config.row_targets:
                found.append(example)
        return found


class RowsAhead:
    """As `StepRows`, by `config.workers` processes, each of which reads `functions`
    (`write_functions`) and the tokenizer for itself."""

    def __init__(
        self, config: RowsConfig, mix: MixConfig, functions: Path, tokenizer: Path, seed: int
    ) -> None:
        self._config = config
        # spawned: this process may hold threads, which a fork would not survive
        self._pool = ProcessPoolExecutor(
            config.workers,
            mp_context=get_context("spawn"),
            initializer=_start,
            initargs=(config, mix, functions, tokenizer, seed),
        )

    def between(self, start: int, end: int) -> Iterator[Rows]:
        """The rows of steps start..end-1."""
        coming: deque[Future[Rows]] = deque()
        try:
            for step in range(start, end):
                coming.append(self._pool.submit(_rows, step))
                if len(coming) > AHEAD * self._config.workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


_maker: StepRows | None = None  # of this process, where it is a worker


def _start(config: RowsConfig, mix: MixConfig, functions: Path, tokenizer: Path, seed: int) -> None:
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the learner's process ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    renderer = Renderer(Tokenizer.load(tokenizer))
    _maker = StepRows(config, mix, read_functions(functions), renderer, seed)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and its workers would wait for ever."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _rows(step: int) -> Rows:
    assert _maker is not None
    return _maker.of(step)


def write_functions(
    path: Path, functions: Sequence[Function], libraries: Sequence[str] = ()
) -> None:
    """Write them as gzipped JSON lines, whole or not at all, behind a line of the libraries that
    they are from."""
    text = json.dumps({"libraries": sorted(libraries)}) + "\n"
    text += "".join(
        json.dumps([f.module, f.name, f.line, f.lines, [_bug(bug) for bug in f.bugs]]) + "\n"
        for f in functions
    )
    write_atomic(path, gzip.compress(text.encode(), 6, mtime=0))


def _bug(bug: Edit) -> list:
    return [bug.line, bug.end_line, bug.old, bug.new, bug.operator]


def read_functions(path: Path, libraries: Sequence[str] | None = None) -> list[Function]:
    """What `write_functions` wrote. Raises InputError for a damaged file, and for one of other
    `libraries` than these."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            of = json.loads(file.readline())["libraries"]
            if libraries is not None and of != sorted(libraries):
                raise InputError(
                    f"{path} was read from the libraries {', '.join(of) or '(none)'}: choose "
                    "another --out, or delete that folder"
                )
            return [_function(*json.loads(line)) for line in file]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}: remove it and start again") from None


def _function(module: str, name: str, line: int, lines: list[str], bugs: list) -> Function:
    return Function(module, name, line, tuple(lines), tuple(Edit(*bug) for bug in bugs))
